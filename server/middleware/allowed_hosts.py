"""Refuses requests for other hosts."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from linalign.server.hosts import host_of, is_this_machine
from linalign.server.protocol.errors import error_response


class AllowedHosts:
    """ASGI middleware that checks the Host header.

    It defends against DNS rebinding: a hostile page lets its own name resolve to 127.0.0.1, and the browser then takes
    a server there for the page's own origin. But the Host header still has the page's name.

    hosts: Allowed names without ports, in lower case. This machine's own names are always allowed.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = host_of(Headers(scope=scope).get("host", "localhost"))  # HTTP/1.0 need not send one
            if not (host in self._hosts or is_this_machine(host)):
                message = "this server does not serve this host name; --allowed-hosts allows more names"
                await error_response(403, message, code="host_not_allowed")(scope, receive, send)
                return
        await self._app(scope, receive, send)
