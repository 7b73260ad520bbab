"""Server-sent events of streamed replies."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Message

from linalign import EngineDead, InvalidRequest, RequestFailed
from linalign.server.core_errors import code_of, described
from linalign.server.replies.submission import Replies

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The complete reply, or a stream of events", "content": {"text/event-stream": {}}}
}


class Event(ServerSentEvent):
    """A server-sent event with OpenAI's line ends. data: Text, or a value that is written as JSON."""

    def __init__(self, data: Any, event: str | None = None) -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        super().__init__(text, event=event, sep="\n")


DONE = Event("[DONE]")
Failure = EngineDead | InvalidRequest | RequestFailed  # errors that end a reply
FAILURES = (EngineDead, InvalidRequest, RequestFailed)


def event_stream(events: AsyncIterator[Event], replies: Sequence[Replies]) -> EventSourceResponse:
    """A streamed response that aborts the replies when the client disconnects."""

    async def on_leave(_: Message) -> None:
        for one in replies:
            one.abort()

    return EventSourceResponse(events, sep="\n", client_close_handler_callable=on_leave)


def failure(error: Failure, path: str) -> Event:
    """The last event of a failed stream. path: The endpoint's."""
    message, param, kind = str(error), None, "server_error"
    if isinstance(error, InvalidRequest):
        message, param = described(error, path)
        kind = "invalid_request_error"
    return Event({"error": {"message": message, "type": kind, "param": param, "code": code_of(error)}})
