"""Logs one line for every request, and answers a 500 after an unexpected exception."""

import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linalign.server.exchange import Exchange, exchange_of
from linalign.server.metrics import Measures
from linalign.server.protocol.errors import error_response

log = logging.getLogger(__name__)

QUIET = ("/health", "/metrics")  # polled every few seconds by machines
CLIENT_GONE = 499  # nginx's


class AccessLog:
    """ASGI middleware. It logs no bodies, no queries, and of a key only the beginning of its hash."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self._app, self._measures = app, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, is_whole, has_left = 0, False, False

        async def noting(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                is_whole = not message.get("more_body", False)
            await send(message)

        async def listening() -> Message:
            nonlocal has_left
            message = await receive()
            has_left = has_left or (message["type"] == "http.disconnect" and not is_whole)
            return message

        scope.setdefault("state", {})["exchange"] = Exchange()
        try:
            await self._app(scope, listening, noting)
        except Exception:
            log.exception("A request failed")
            if status:
                raise  # part of the response is sent already: the connection is closed
            response = error_response(500, "internal error", code="internal_error", kind="server_error")
            await response(scope, receive, noting)
        finally:
            self._record(scope, status or CLIENT_GONE, has_left)

    def _record(self, scope: Scope, status: int, has_left: bool) -> None:
        exchange, route = exchange_of(scope), getattr(scope.get("route"), "path", "other")
        seconds = time.monotonic() - exchange.began
        self._measures.responses.labels(route, status).inc()
        if exchange.error_code:
            self._measures.rejected.labels(exchange.error_code).inc()
        path = scope["raw_path"].decode("ascii", "replace")[:256]  # line ends and the like are still percent-encoded
        facts = {
            "method": scope["method"],
            "path": path,
            "status": status,
            "seconds": round(seconds, 4),
            "client": scope["client"]
            and re.sub(r"[^\w.:-]", "?", scope["client"][0]),  # may come from a proxy's header
            "client_left": has_left,
            "key": exchange.key and exchange.key.hex()[:8],
            "code": exchange.error_code,
            "principle_from": exchange.applied and exchange.applied.principle_from,
            "prompt_tokens": exchange.num_prompt_tokens,
            "completion_tokens": exchange.num_completion_tokens,
            "finish_reasons": ",".join(dict.fromkeys(exchange.finish_reasons)),
        }
        facts = {name: value for name, value in facts.items() if value}
        words = " ".join(f"{name}={value}" for name, value in facts.items())
        level = logging.DEBUG if route in QUIET and status < 400 else logging.INFO
        log.log(level, words, extra={"request": facts})
