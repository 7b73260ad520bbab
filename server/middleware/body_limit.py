"""Refuses long bodies before they are parsed."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linalign.server.protocol.errors import error_response


class BodyLimit:
    """ASGI middleware: a body of more than `max_bytes`, by its Content-Length or by its size, is a 413."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message_text = f"the body may have {self._max_bytes} bytes at most"
        length = Headers(scope=scope).get("content-length", "").lstrip("0")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._max_bytes):
            await error_response(413, message_text, code="body_too_large")(scope, receive, send)
            return
        num_bytes = 0

        async def counting() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, message_text)
            return message

        await self._app(scope, counting, send)
