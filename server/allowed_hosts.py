"""Whose server this is: requests that ask for another host are refused."""

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from linalign.server.hosts import host_of, is_this_machine
from linalign.server.protocol.errors import error_response


class AllowedHosts:
    """ASGI middleware. hosts: names without ports, in lower case; this machine's own are always among them.

    A page can have its name resolved to 127.0.0.1 (DNS rebinding): for the browser, a server there is then of the
    page's own origin. But the browser still says the page's name.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = host_of(Headers(scope=scope).get("host", "localhost"))  # HTTP/1.0 need not say any
            if not (host in self._hosts or is_this_machine(host)):
                told = "this server does not answer for the host that was asked for: --allowed-hosts names more"
                await error_response(403, told, code="host_not_allowed")(scope, receive, send)
                return
        await self._app(scope, receive, send)
