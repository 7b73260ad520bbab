"""Matches a reply with its structure, and bounds runs in its JSON: digits of a number, white space in a string.

A schema allows endless runs, and models get stuck in them until max_tokens. llama.cpp's grammars bound numbers in the
same way.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_DIGITS = 16  # of a number, before and after the decimal point
MAX_SPACES = 64  # in a string
DIGITS, SPACES = b"0123456789", b" "
ESCAPED_SPACES = b"ntr"
BETWEEN = b" \n\t\r,;{}[]"  # bytes between the calls of a list, and around them
Mask = NDArray[np.bool_]


class TokenRuns:
    """The bytes of all tokens, and the lengths of the runs that they begin with."""

    def __init__(self, token_bytes: Callable[[int], bytes], vocab_size: int) -> None:
        self.bytes_of = token_bytes
        tokens = [token_bytes(id) for id in range(vocab_size)]
        self.digits = np.array([len(token) - len(token.lstrip(DIGITS)) for token in tokens], np.uint16)
        self.spaces = np.array([_num_spaces(token) for token in tokens], np.uint16)
        self.has_long_digits = bool((self.digits > MAX_DIGITS).any())
        self.has_long_spaces = bool((self.spaces > MAX_SPACES).any())


class JsonRuns:
    """Follows the JSON of a reply, and forbids tokens that would make a run too long.

    begin: The text after which JSON begins, each time; "" if it begins at once. may_begin_at_once: Whether a reply that
        begins with an object does not have this text.
    """

    def __init__(self, tokens: TokenRuns, begin: str, may_begin_at_once: bool = False) -> None:
        self._tokens, self._begin, self._may_begin_at_once = tokens, begin.encode(), may_begin_at_once
        self._before = b""  # the end of the text in front of the JSON
        self._depth = 0 if begin else 1  # of objects and lists; 0 in front of the JSON
        self._in_string = self._escaped = False
        self._num_digits = self._num_spaces = 0  # of the run that the text ends with

    def take(self, token: int) -> None:
        """Follow the token that was drawn."""
        for byte in self._tokens.bytes_of(token):
            self._take(byte.to_bytes(1))

    def _take(self, byte: bytes) -> None:
        if not self._depth:
            begins_at_once = self._may_begin_at_once and byte == b"{" and not self._before.strip()
            self._before = (self._before + byte)[-len(self._begin) :]
            if self._before == self._begin:
                self._depth, self._before = 1, b""
            if not begins_at_once:
                return
            self._depth, self._before = 1, b""
        if self._depth == 1 and self._begin and not self._in_string and byte not in BETWEEN:  # the JSON has ended
            self._depth, self._before = 0, byte
            return
        if self._escaped:
            self._escaped = False
            self._num_spaces = self._num_spaces + 1 if byte in ESCAPED_SPACES else 0
        elif self._in_string and byte == b"\\":
            self._escaped = True
        elif byte == b'"':
            self._in_string, self._num_spaces = not self._in_string, 0
        else:
            self._num_spaces = self._num_spaces + 1 if byte in SPACES else 0
            if self._begin and not self._in_string:
                self._depth = max(1, self._depth + (byte in b"{[") - (byte in b"}]"))
        self._num_digits = self._num_digits + 1 if byte in DIGITS else 0

    @property
    def forbidden(self) -> Mask | None:
        """Tokens that would make a run too long, [V]; None if there are none."""
        if not self._depth or self._escaped:
            return None
        num, lengths, most, has_long = self._num_digits, self._tokens.digits, MAX_DIGITS, self._tokens.has_long_digits
        if self._in_string:
            num, lengths, most = self._num_spaces, self._tokens.spaces, MAX_SPACES
            has_long = self._tokens.has_long_spaces
        return lengths > max(most - num, 0) if num or has_long else None


class ReplyMatcher:
    """The place of a reply in its structure."""

    def __init__(self, matcher: "LLMatcher", runs: JsonRuns | None) -> None:
        self._matcher, self._runs = matcher, runs
        self.is_accepting, self.is_stopped = matcher.is_accepting, matcher.is_stopped
        self.is_error, self.get_error = matcher.is_error, matcher.get_error

    def consume_token(self, token: int) -> bool:
        """Follow the token that was drawn; False if the structure does not allow it."""
        if self._runs is not None:
            self._runs.take(token)
        return self._matcher.consume_token(token)

    def allowed(self, num_tokens: int) -> Mask:
        """Whether each token may be next, [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed: Mask = np.unpackbits(bits, count=num_tokens, bitorder="little") == 1
        forbidden = None if self._runs is None else self._runs.forbidden
        if forbidden is None:
            return allowed
        bounded: Mask = allowed & ~forbidden[:num_tokens]
        return bounded if bounded.any() else allowed  # for example in a constant with many digits


def _num_spaces(token: bytes) -> int:
    """White space, as characters or as escapes, at the beginning of a token of a JSON string."""
    num = place = 0
    while True:
        if token[place : place + 1] and token[place : place + 1] in SPACES:
            place += 1
        elif token[place : place + 1] == b"\\" and token[place + 1 : place + 2] in (b"", b"n", b"t", b"r"):
            place += 2  # a backslash at the end of a token may begin such an escape
        else:
            return num
        num += 1
