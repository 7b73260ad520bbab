"""Limits of each API key: simultaneous requests, and tokens per minute."""

import math
import time
from collections import defaultdict

from starlette.types import ASGIApp, Receive, Scope, Send

from linalign import InvalidRequest
from linalign.server.exchange import KeyBusy, exchange_of
from linalign.server.protocol.errors import key_busy

AT_ONCE = ("key_requests", 1.0)  # code, and seconds to wait
WITHOUT_MODEL = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")


class Bucket:
    """A token bucket that holds at most the tokens of one minute, and is refilled continuously.

    It may be overdrawn, because the length of a reply is unknown in advance. Then no new request begins until it is
    positive again.
    """

    def __init__(self, tokens_per_minute: float) -> None:
        self._rate, self._capacity = tokens_per_minute / 60, tokens_per_minute
        self._level, self._when = self._capacity, time.monotonic()

    def take(self, num_tokens: int) -> None:
        self._fill_up()
        self._level -= num_tokens

    @property
    def wait(self) -> float:
        """Seconds until the bucket has a token."""
        self._fill_up()
        return max(0.0, (1 - self._level) / self._rate)

    def _fill_up(self) -> None:
        now = time.monotonic()
        self._level = min(self._capacity, self._level + (now - self._when) * self._rate)
        self._when = now


class Allowance:
    """The current use of one key.

    maximum: Limit of simultaneous requests, and of choices. bucket: Of tokens, if they are limited.
    """

    def __init__(self, maximum: float, bucket: Bucket | None) -> None:
        self._maximum, self._bucket = maximum, bucket
        self.num_requests = self._num_choices = 0

    def check(self, takes_tokens: bool) -> None:
        """Raises KeyBusy if no further request may begin. takes_tokens: Whether the request needs the model."""
        if self.num_requests >= self._maximum:
            raise KeyBusy(f"this API key has {self._maximum} running requests, which is its limit", *AT_ONCE)
        if takes_tokens:
            self._check_tokens()

    def admit(self, num_choices: int) -> None:
        """Count new choices. Raises KeyBusy if too many run already, InvalidRequest for more than the limit."""
        if num_choices > self._maximum:
            raise InvalidRequest(f"{num_choices} choices exceed the limit of this API key, {self._maximum}", "n")
        if self._num_choices + num_choices > self._maximum:
            raise KeyBusy(f"this API key may have {self._maximum} running choices in all its requests", *AT_ONCE)
        self._check_tokens()
        self._num_choices += num_choices

    def leave(self, num_choices: int) -> None:
        self._num_choices -= num_choices

    def charge(self, num_tokens: int) -> None:
        if self._bucket:
            self._bucket.take(num_tokens)

    def _check_tokens(self) -> None:
        if self._bucket and self._bucket.wait:
            raise KeyBusy("this API key has used up its tokens per minute", "key_tokens", self._bucket.wait)


class KeyLimits:
    """ASGI middleware behind KeyRequired.

    A request counts while it is answered, and so does each of its choices. Tokens of all branches count, cached ones
    too: those of a prompt when it is submitted, those of a reply when it ends.

    max_requests, tokens_per_minute: Limits of each key; None for no limit.
    """

    def __init__(self, app: ASGIApp, max_requests: int | None, tokens_per_minute: int | None) -> None:
        self._app = app
        self._of: defaultdict[bytes, Allowance] = defaultdict(
            lambda: Allowance(max_requests or math.inf, Bucket(tokens_per_minute) if tokens_per_minute else None)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or (exchange := exchange_of(scope)).key is None:
            await self._app(scope, receive, send)
            return
        allowance = self._of[exchange.key]
        try:
            allowance.check(takes_tokens=scope["path"].removeprefix(scope.get("root_path", "")) not in WITHOUT_MODEL)
        except KeyBusy as error:
            await key_busy(error)(scope, receive, send)
            return
        exchange.admit, exchange.leave, exchange.charge = allowance.admit, allowance.leave, allowance.charge
        allowance.num_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            allowance.num_requests -= 1
