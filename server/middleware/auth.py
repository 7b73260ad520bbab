"""API keys. Without a key only the open paths are served."""

import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from linalign.server.exchange import exchange_of
from linalign.server.protocol.errors import error_response

# Orchestrators have no key. The playground's page must load to ask for one; it holds no data.
OPEN = ("/", "/health")
OPEN_BELOW = "/playground/"


class KeyRequired:
    """ASGI middleware: "Authorization: Bearer KEY" or "X-Api-Key: KEY" with one of the keys, or a 401.

    hashes: SHA-256 of the keys. All of them are compared, in constant time.
    open: Paths without a key, like those below OPEN_BELOW. All other paths need a key, future routes included.
    """

    def __init__(self, app: ASGIApp, hashes: Collection[bytes], open: Collection[str] = OPEN) -> None:
        self._app, self._hashes, self._open = app, hashes, open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            exchange_of(scope).key = key = self._known(Headers(scope=scope))
            if key is None and not self._is_open(scope["path"].removeprefix(scope.get("root_path", ""))):
                message = "an API key is needed: Authorization: Bearer KEY"
                refusal = error_response(401, message, code="invalid_api_key")
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in self._open or path.startswith(OPEN_BELOW)

    def _known(self, headers: Headers) -> bytes | None:
        """The hash of the request's key, if it is one of ours."""
        authorization = headers.get("authorization") or f"Bearer {headers.get('x-api-key', '')}"
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = [known for known in self._hashes if hmac.compare_digest(given, known)]
        return matches[0] if matches and scheme.lower() == "bearer" else None
