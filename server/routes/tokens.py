"""POST /tokenize and /detokenize."""

from typing import Any

from fastapi import APIRouter, Request

from linalign import InvalidRequest
from linalign.server.models import preset_of
from linalign.server.protocol.tokens import DetokenizeRequest, TokenizeRequest
from linalign.server.routes.acceptance import accept, note_ignored, rendering_of
from linalign.server.routes.chat_completions import build_prompt
from linalign.server.routes.strict_route import StrictRoute
from linalign.server.state import state_of
from linalign.server.threads import in_thread

router = APIRouter(route_class=StrictRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The token ids of the first branch, which usage counts, and of all branches: principled ones, then the base."""
    engine = state_of(request).engine
    body = accept(body, request)
    if body.messages is None:
        principles = body.principles(state_of(request).settings.default_alignment_ratio)
        method = body.alignment_method or "linear"
        prompt = await in_thread(request, engine.prompts.build_text, body.prompt or "", principles, method=method)
    else:
        prompt = await in_thread(request, build_prompt, body, rendering_of(body, request), state_of(request))
    branches: list[dict[str, Any]] = [
        {"branch": "principled", "weight": weight, "ratio": ratio, "tokens": list(ids)}
        for ids, weight, ratio in zip(prompt.principled, prompt.weights, prompt.ratios, strict=True)
    ]
    if prompt.base is not None:
        branches.append({"branch": "base", "tokens": list(prompt.base)})
    tokens = list(prompt.principled[0])
    return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.max_model_len, "branches": branches}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    engine = state_of(request).engine
    note_ignored(request, body.ignored)
    preset_of(body.model, state_of(request))
    for id in body.tokens:
        if id >= engine.vocab_size:
            raise InvalidRequest(f"the vocabulary has no token {id}", "tokens")
    return {"prompt": await in_thread(request, engine.tokenizer.decode, body.tokens)}
