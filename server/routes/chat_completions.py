"""POST /v1/chat/completions."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from linalign import Prompt
from linalign.alignment_core.text.chat_template import Rendering
from linalign.server.engine_client import EngineClient
from linalign.server.exchange import exchange_of
from linalign.server.protocol.chat_request import ChatCompletionRequest, ChatFields
from linalign.server.replies.chat_completion import PATH, ChatCompletion
from linalign.server.replies.events import STREAMED, event_stream
from linalign.server.replies.submission import Replies, gather
from linalign.server.routes.acceptance import accept, note_if_shortened, note_ignored, rendering_of
from linalign.server.routes.strict_route import StrictRoute
from linalign.server.state import state_of
from linalign.server.threads import in_thread
from linalign.server.tool_calls import ReplyParser, call_format, end_of_thinking, marks_are_special
from linalign.server.tool_grammars import calls_or, literal, required_calls, strict_calls

router = APIRouter(route_class=StrictRoute)


@router.post(PATH, response_model=None, responses=STREAMED)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response | dict[str, Any]:
    state = state_of(request)
    body = accept(body, request)
    replies, prompt, new_parser = await submit_chat(body, request)
    completion = ChatCompletion(
        state.engine, body, state.fingerprint, prompt, new_parser, exchange_of(request.scope).applied
    )
    if body.stream:
        options = body.stream_options
        has_usage = bool(options and options.include_usage)
        has_counts = has_usage and bool(options and options.continuous_usage_stats)
        return event_stream(completion.events(replies, has_usage, has_counts), [replies])
    outputs = await gather([replies], request)
    return completion.whole(outputs[0], replies.n) if outputs else Response(status_code=499)


async def submit_chat(
    body: ChatCompletionRequest, request: Request
) -> tuple[Replies, Prompt, Callable[[], ReplyParser]]:
    """Submit a chat. Returns its replies, its prompt, and a function that creates a parser for one choice.

    Raises InvalidRequest, EngineDead, EngineBusy, KeyBusy.
    """
    engine = state_of(request).engine
    engine.refuse_early()
    prompt, rendering = await build_prompt(body, request)
    begun = "" if rendering.continues else await in_thread(request, engine.prompts.generation_prompt, rendering)
    if body.requires_call and body.structure():
        note_ignored(request, ["response_format" if body.structured_outputs is None else "structured_outputs"])
    more = await in_thread(request, _for_tools, body, engine, end_of_thinking(begun))
    params = body.sampling_params(**more)
    note_if_shortened(request, [prompt], params.max_tokens, body.max_tokens_field)
    max_calls = math.inf if body.parallel else 1
    (replies,) = await Replies.submit(request, body, [prompt], params)
    tools, only_calls = rendering.tools, body.requires_call
    return replies, prompt, lambda: ReplyParser(engine.tokenizer, begun, tools, max_calls, only_calls)


async def build_prompt(body: ChatFields, request: Request) -> tuple[Prompt, Rendering]:
    """The prompt of a chat, and how the template has rendered it. Raises InvalidRequest."""
    state = state_of(request)
    principles = body.principles(state.settings.default_alignment_ratio)
    placement, method = body.principle_placement or "system", body.alignment_method or "linear"
    rendering = rendering_of(body, request)

    def build() -> Prompt:
        return state.engine.prompts.build(body.rendered_messages(), principles, placement, rendering, method)

    return await in_thread(request, build), rendering


def _for_tools(body: ChatCompletionRequest, engine: EngineClient, mark: str) -> dict[str, Any]:
    """Sampling parameters for tools and reasoning. mark: The end of reasoning that the prompt has begun, or ""."""
    after = mark and literal(mark, engine.tokenizer)
    tools, parallel = body.callable_tools(), body.parallel
    more: dict[str, Any] = {}
    if body.requires_call:
        more["structure"] = required_calls(engine.tokenizer, tools, parallel and body.tool_choice == "required", after)
    elif structure := body.structure():
        structure = replace(structure, after=after, json_after=mark)
        more["structure"] = calls_or(structure, engine.tokenizer, tools, parallel) if tools else structure
    elif any(tool["function"].get("strict") for tool in tools):
        more["structure"] = strict_calls(engine.tokenizer, tools, parallel, after)
    if tools:
        more["uncut"] = call_format(engine.tokenizer).uncut
    if tools and marks_are_special(engine.tokenizer):
        more["skip_special_tokens"] = False
    return more
