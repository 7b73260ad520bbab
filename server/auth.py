"""API keys: without one of them nothing is served but what is open to everyone."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.protocol.errors import error_response

# Orchestrators have no key, and the playground's page must be there to ask for one; it holds no data.
OPEN = ("/", "/health")
OPEN_BELOW = "/playground/"


class KeyRequired:
    """ASGI middleware: "Authorization: Bearer KEY" with one of the keys, or a 401 in OpenAI's shape.

    Only hashes of the keys are kept, and all are compared in constant time. Every path is closed that is not in
    OPEN or below OPEN_BELOW, routes to come included.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._hashes = [_hash(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope["path"]) or self._knows(Headers(scope=scope)):
            await self._app(scope, receive, send)
        else:
            refusal = error_response(401, "an API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            await refusal(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in OPEN or path.startswith(OPEN_BELOW)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _hash(key.strip().encode())
        matches = [hmac.compare_digest(given, known) for known in self._hashes]  # all, whichever it is
        return scheme.lower() == "bearer" and any(matches)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
