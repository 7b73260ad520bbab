"""POST /v1/chat/completions."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from linalign import InvalidRequest, Prompt
from linalign.alignment_core.request import Thinking
from linalign.alignment_core.text.chat_template import Rendering
from linalign.server import harmony
from linalign.server.core_errors import name_on
from linalign.server.deltas import Parser
from linalign.server.engine_client import EngineClient
from linalign.server.exchange import exchange_of
from linalign.server.protocol.chat_request import ChatCompletionRequest, ChatFields
from linalign.server.reasoning import Marks, thinking_budget, thinking_marks
from linalign.server.replies.chat_completion import PATH, ChatCompletion
from linalign.server.replies.events import STREAMED, event_stream
from linalign.server.replies.submission import Replies, gather
from linalign.server.routes.acceptance import accept, note_if_shortened, note_ignored, rendering_of
from linalign.server.routes.strict_route import StrictRoute
from linalign.server.state import ServerState, state_of
from linalign.server.threads import in_thread
from linalign.server.tool_calls import ReplyParser, call_format, marks_are_special
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


async def submit_chat(body: ChatCompletionRequest, request: Request) -> tuple[Replies, Prompt, Callable[[], Parser]]:
    """Submit a chat. Returns its replies, its prompt, and a function that creates a parser for one choice.

    Raises InvalidRequest, EngineDead, EngineBusy, KeyBusy.
    """
    state = state_of(request)
    engine = state.engine
    engine.refuse_early()
    if body.requires_call and body.structure():
        note_ignored(request, ["response_format" if body.structured_outputs is None else "structured_outputs"])
    rendering = rendering_of(body, request)

    def build() -> tuple[Prompt, str, Marks | None, dict[str, Any]]:
        prompt = build_prompt(body, rendering, state)
        begun = "" if rendering.continues else engine.prompts.generation_prompt(rendering)
        marks = thinking_marks(engine.tokenizer, begun)
        return prompt, begun, marks, _for_tools(body, engine, marks)

    prompt, begun, marks, more = await in_thread(request, build)
    params = body.sampling_params(thinking=_thinking(body, request, marks), **more)
    note_if_shortened(request, [prompt], params.max_tokens, body.max_tokens_field)
    max_calls = math.inf if body.parallel else 1
    (replies,) = await Replies.submit(request, body, [prompt], params)
    tools, only_calls = rendering.tools, body.requires_call

    def new_parser() -> Parser:
        if harmony.is_harmony(engine.tokenizer):
            return harmony.HarmonyParser(begun, bool(tools), max_calls)
        return ReplyParser(engine.tokenizer, begun, tools, max_calls, only_calls)

    return replies, prompt, new_parser


def build_prompt(body: ChatFields, rendering: Rendering, state: ServerState) -> Prompt:
    """The prompt of a chat. Call it in a thread. Raises InvalidRequest."""
    principles = body.principles(state.settings.default_alignment_ratio)
    placement, method = body.principle_placement or "system", body.alignment_method or "linear"
    return state.engine.prompts.build(body.rendered_messages(), principles, placement, rendering, method)


def _thinking(body: ChatCompletionRequest, request: Request, marks: Marks | None) -> Thinking | None:
    """The bound for the reply's reasoning: the request's, or that of its effort in the settings."""
    state, budget = state_of(request), body.thinking_token_budget
    if budget is None:
        budget = state.settings.thinking_budgets.get(body.reasoning_effort) if body.reasoning_effort else None
    elif marks is None and budget:
        note_ignored(request, [name_on(request.scope["route"].path, "thinking_token_budget")])
    if marks is None or budget is None:
        return None
    return thinking_budget(state.engine.tokenizer, marks, budget, may_call=bool(body.callable_tools()))


def _for_tools(body: ChatCompletionRequest, engine: EngineClient, marks: Marks | None) -> dict[str, Any]:
    """Sampling parameters for tools and structures, behind the reasoning. marks: Of the reasoning."""
    tokenizer, tools, parallel = engine.tokenizer, body.callable_tools(), body.parallel
    if marks is None and harmony.is_harmony(tokenizer):  # the prompt has begun the answer
        if body.requires_call:
            raise InvalidRequest("a call of this model can't follow the beginning of an answer", "tool_choice")
        tools = []
    after = literal(marks.end, tokenizer) if marks else ""
    before = literal(marks.begin, tokenizer) if marks and not marks.is_begun else ""
    head = literal(marks.answer, tokenizer) if marks else ""
    behind: dict[str, Any] = {"after": after, "before": before, "may_space": not head}
    more: dict[str, Any] = {}
    if body.requires_call:
        structure = required_calls(tokenizer, tools, parallel and body.named_function is None)
        more["structure"] = replace(structure, **behind)
    elif format := body.structure():
        format = calls_or(format, tokenizer, tools, parallel) if tools else format
        json_after = (harmony.BODY if marks.answer else marks.end) if marks else ""
        more["structure"] = replace(format, head=head, json_after=json_after, **behind)
    elif any(tool["function"].get("strict") for tool in tools):
        strict = strict_calls(tokenizer, tools, parallel)
        # In most formats this structure begins with any text, such as the reasoning that the model begins.
        more["structure"] = replace(strict, **behind) if head or not before else strict
    if tools:
        more["uncut"] = call_format(tokenizer).uncut
    if (tools or marks) and marks_are_special(tokenizer):
        more["skip_special_tokens"] = False
    return more
