"""Ends the reasoning of a reply when its budget is used up, by forcing the mark that closes the reasoning."""

from collections.abc import Callable

from linalign.alignment_core.request import Thinking


class ThinkingBudget:
    """Follows the reasoning of one reply. `forced` is the token that must be next; None if any may be.

    is_over: Whether the reply's reasoning has ended, or the reply has none.
    """

    def __init__(self, thinking: Thinking, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes, self._budget, self._end_ids = token_bytes, thinking.budget, thinking.end_ids
        self._begin, self._end = thinking.begin.encode(), thinking.end.encode()
        self._is_open, self.is_over = thinking.is_begun, False
        self._text = b""  # in front of the reasoning, or the last bytes of it
        self._num_tokens = self._num_forced = 0

    def take(self, token: int) -> None:
        """Follow the token that was drawn."""
        if self.is_over:
            return
        if self.forced is not None:
            self._num_forced += 1
        self._text += self._token_bytes(token)
        if self._is_open:
            self._num_tokens += 1
            # The mark may be a part of a token, and the token may hold more text after the mark.
            self.is_over = self._end in self._text
            self._text = self._text[-len(self._end) :]
            return
        before = self._text.lstrip()
        if before.startswith(self._begin):
            self._is_open, self._text = True, before[len(self._begin) :]
            self.is_over = self._end in self._text
        else:
            self.is_over = not self._begin.startswith(before)

    @property
    def forced(self) -> int | None:
        if self.is_over or not self._is_open or self._num_tokens < self._budget + self._num_forced:
            return None
        return self._end_ids[self._num_forced] if self._num_forced < len(self._end_ids) else None
