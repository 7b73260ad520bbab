"""POST /v1/completions."""

import itertools
from typing import Any

from fastapi import APIRouter, Request, Response

from linalign import Prompt
from linalign.server.exchange import exchange_of
from linalign.server.protocol.completions import CompletionRequest
from linalign.server.replies.events import STREAMED, event_stream
from linalign.server.replies.submission import Replies, gather
from linalign.server.replies.text_completion import PATH, TextCompletion
from linalign.server.routes.acceptance import accept, note_if_shortened
from linalign.server.routes.strict_route import StrictRoute
from linalign.server.state import state_of
from linalign.server.threads import in_thread

router = APIRouter(route_class=StrictRoute)


@router.post(PATH, response_model=None, responses=STREAMED)
async def create_completion(body: CompletionRequest, request: Request) -> Response | dict[str, Any]:
    state = state_of(request)
    engine = state.engine
    engine.refuse_early()
    body = accept(body, request)
    principles = body.principles(state.settings.default_alignment_ratio)

    def build() -> tuple[list[tuple[int, ...]], list[Prompt]]:
        texts = [engine.prompts.text_ids(text) for text in body.prompts()]
        method = body.alignment_method or "linear"
        return texts, [engine.prompts.build_text(ids, principles, body.scores, method) for ids in texts]

    texts, prompts = await in_thread(request, build)
    params = body.sampling_params()
    note_if_shortened(request, prompts, body.max_tokens, "max_tokens")
    needs_engine = [bool(params.max_tokens or prompt.given) for prompt in prompts]
    submitted = iter(await Replies.submit(request, body, list(itertools.compress(prompts, needs_engine)), params))
    replies = [
        next(submitted) if needed else Replies.empty(engine, prompt, body.n or 1)
        for prompt, needed in zip(prompts, needs_engine, strict=True)
    ]
    completion = TextCompletion(engine, state.fingerprint, body, texts, prompts, exchange_of(request.scope).applied)
    if body.stream:
        return event_stream(completion.events(replies), replies)
    outputs = await gather(replies, request)
    return completion.whole(outputs) if outputs else Response(status_code=499)
