"""What one API key may use: requests at once, and tokens a minute."""

import math
import time
from collections import defaultdict

from starlette.types import ASGIApp, Receive, Scope, Send

from server.exchange import exchange_of
from server.protocol.errors import error_response


class Bucket:
    """Tokens that may be used: a minute's worth at most, filled up all the time. It may be overdrawn, as nobody knows
    how long a reply will be; then nothing more is begun until that is made up for.
    """

    def __init__(self, tokens_per_minute: float) -> None:
        self._rate, self._most = tokens_per_minute / 60, tokens_per_minute
        self._level, self._when = self._most, time.monotonic()

    def take(self, num_tokens: int) -> None:
        self._fill_up()
        self._level -= num_tokens

    @property
    def wait(self) -> float:
        """Seconds until there is something in it."""
        self._fill_up()
        return max(0.0, (1 - self._level) / self._rate)

    def _fill_up(self) -> None:
        now = time.monotonic()
        self._level = min(self._most, self._level + (now - self._when) * self._rate)
        self._when = now


class KeyLimits:
    """ASGI middleware behind KeyRequired. max_requests, tokens_per_minute: of each key, None for any number.

    A request counts while it is answered. Tokens are those of `usage`: a prompt's when it is submitted, a reply's
    when it ends.
    """

    def __init__(self, app: ASGIApp, max_requests: int | None, tokens_per_minute: int | None) -> None:
        self._app, self._most = app, max_requests or math.inf
        self._running: defaultdict[bytes, int] = defaultdict(int)
        self._buckets: defaultdict[bytes, Bucket | None] = defaultdict(
            lambda: Bucket(tokens_per_minute) if tokens_per_minute else None
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or (exchange := exchange_of(scope)).key is None:
            await self._app(scope, receive, send)
            return
        key, bucket = exchange.key, self._buckets[exchange.key]
        if self._running[key] >= self._most:
            told = f"this API key has {self._most} requests running already, as many as it may"
            await _refuse(told, "key_requests", 1.0)(scope, receive, send)
        elif bucket and bucket.wait:
            told = "this API key has used up its tokens per minute"
            await _refuse(told, "key_tokens", bucket.wait)(scope, receive, send)
        else:
            if bucket:
                exchange.charge = bucket.take
            self._running[key] += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._running[key] -= 1


def _refuse(message: str, code: str, seconds: float) -> ASGIApp:
    refusal = error_response(429, message, code=code, kind="rate_limit_error")
    refusal.headers["Retry-After"] = str(math.ceil(seconds))
    return refusal
