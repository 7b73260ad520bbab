"""Ends the reasoning of a reply when its budget is used up, by forcing the mark that closes the reasoning."""

from collections.abc import Callable

from linalign.alignment_core.request import Thinking


class ThinkingBudget:
    """Follows the reasoning of one reply. `forced` is the token that must be next; None if any may be.

    is_over: Whether no reasoning can follow: the reply's reasoning has ended, or the reply has none.
    """

    def __init__(self, thinking: Thinking, token_bytes: Callable[[int], bytes]) -> None:
        self._thinking, self._token_bytes = thinking, token_bytes
        self._begin, self._end = thinking.begin.encode(), thinking.end.encode()
        self._is_open, self.is_over = thinking.is_begun, False
        self._may_begin = not thinking.is_begun  # whether the text so far may be the first mark
        self._text = b""  # behind the last mark, or the end of it
        self._num_tokens = self._num_waits = 0
        self._left: tuple[int, ...] = ()  # tokens of the mark that are forced next
        self._force_if_used_up()

    @property
    def forced(self) -> int | None:
        return self._left[0] if self._left else None

    def take(self, token: int) -> None:
        """Follow the token that was drawn."""
        if self.is_over:
            return
        if self._left:
            self._left = self._left[1:]
            if not self._left:
                self._close(b"")
            return
        self._text += self._token_bytes(token)
        self._num_tokens += self._is_open
        while self._pass_mark():
            pass
        self._force_if_used_up()

    def _pass_mark(self) -> bool:
        """Pass the next mark in the text; False if the text has none. A mark may be a part of a token."""
        if self._is_open or not self._may_begin:
            _, mark, rest = self._text.partition(self._end)
            if mark:
                self._close(rest)
                return not self.is_over
            self._text = self._text[-len(self._end) :]
            return False
        text = self._text.lstrip()
        if text.startswith(self._begin):
            self._is_open, self._may_begin, self._text = True, False, text[len(self._begin) :]
            return True
        if not self._begin.startswith(text):
            self._may_begin, self.is_over = False, not self._thinking.repeats
        return False

    def _close(self, rest: bytes) -> None:
        """The end of a part of the reply. rest: The text behind it."""
        self._is_open, self._may_begin, self._text = False, True, rest
        self.is_over = not self._thinking.repeats

    def _force_if_used_up(self) -> None:
        if not self._is_open or self._num_tokens < self._thinking.budget:
            return
        ids, sizes = self._thinking.end_ids, range(len(self._end) - 1, -1, -1)
        num_written = next(size for size in sizes if self._text.endswith(self._end[:size]))  # bytes of a begun mark
        num_bytes = 0
        for place, id in enumerate(ids):
            if num_bytes == num_written:
                self._left = ids[place:]
                return
            num_bytes += len(self._token_bytes(id))
        # The reasoning ends within a token of the mark, so the model must end this token itself. A structure forces it.
        if num_written > len(self._token_bytes(ids[0])) and self._num_waits < len(self._end):
            self._num_waits += 1
        else:
            self._left = ids
