"""POST /v1/chat/completions."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from sse_starlette import EventSourceResponse
from starlette.types import Message

from alignment_core import Engine, Output
from server.protocol.chat import ChatCompletionRequest
from server.protocol.errors import ModelNotFound
from server.streaming import Completion, Replies

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
    replies = Replies(engine, prompt, body.sampling_params())
    completion = Completion(engine.model_id)
    if body.stream:

        async def on_leave(_: Message) -> None:
            replies.abort()

        include_usage = body.stream_options is not None and body.stream_options.include_usage
        events = completion.events(replies, include_usage)
        return EventSourceResponse(events, sep="\n", client_close_handler_callable=on_leave)
    text, last = await _whole(replies, request)
    return completion.whole(text, last) if last else Response(status_code=499)


async def _whole(replies: Replies, request: Request) -> tuple[str, Output | None]:
    """The complete reply, or None as the last output if the client has gone meanwhile."""
    collecting = asyncio.ensure_future(_collect(replies))
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else ("", None)
    finally:
        replies.abort()
        leaving.cancel()
        collecting.cancel()


async def _collect(replies: Replies) -> tuple[str, Output]:
    outputs = [output async for output in replies]
    return "".join(output.text for output in outputs), outputs[-1]


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
