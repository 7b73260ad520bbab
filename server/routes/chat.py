"""POST /v1/chat/completions."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from sse_starlette import EventSourceResponse

from alignment_core import Engine, Output
from server.protocol.chat import ChatCompletionRequest
from server.protocol.errors import ModelNotFound
from server.streaming import Completion, outputs

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response | dict[str, Any]:
    engine: Engine = request.app.state.engine
    if body.model != engine.model_id:
        raise ModelNotFound(body.model)
    principles = body.principles(request.app.state.settings.default_alignment_ratio)
    messages = [message.rendered() for message in body.messages]
    placement = body.principle_placement or "system"
    prompt = await asyncio.to_thread(engine.prompts.build, messages, principles, placement)
    replies = outputs(engine, prompt, body.sampling_params())
    completion = Completion(engine.model_id)
    if body.stream:
        first = await anext(replies)  # so that what is refused is refused with a status, not in the stream
        events = completion.events(
            _with_first(first, replies), bool(body.stream_options and body.stream_options.include_usage)
        )
        return EventSourceResponse(events, sep="\n")
    text, last = await _whole(replies, request)
    return completion.whole(text, last) if last else Response(status_code=499)


async def _with_first(first: Output, replies: AsyncIterator[Output]) -> AsyncIterator[Output]:
    async with aclosing(replies) as rest:  # type: ignore[type-var]
        yield first
        if not first.finish_reason:
            async for output in rest:
                yield output


async def _whole(replies: AsyncIterator[Output], request: Request) -> tuple[str, Output | None]:
    """The complete reply, or None as the last output if the client has gone meanwhile."""
    collecting = asyncio.ensure_future(_collect(replies))
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else ("", None)
    finally:
        leaving.cancel()
        collecting.cancel()


async def _collect(replies: AsyncIterator[Output]) -> tuple[str, Output]:
    texts = []
    async with aclosing(replies) as all_replies:  # type: ignore[type-var]
        async for output in all_replies:
            texts.append(output.text)
    return "".join(texts), output


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
