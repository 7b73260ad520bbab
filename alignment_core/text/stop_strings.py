"""Ends a text in front of a stop string, while the text arrives."""

from collections.abc import Iterator

from linalign.alignment_core.request import Uncut


class StopStrings:
    """The stop strings of one text. `found` is the one that has ended the text."""

    def __init__(self, stop: tuple[str, ...], uncut: Uncut | None = None) -> None:
        """uncut: The part of the text that stop strings do not end."""
        self.found: str | None = None
        self._stops = [_Pattern(text) for text in stop]
        self._uncut = _UncutPart(uncut) if uncut and stop else None
        self._held = ""  # text held back, as it may be the beginning of a stop string

    def until_stop(self, text: str, may_stop: bool = True) -> str:
        """The text that is complete with this piece of it.

        may_stop: Whether a stop string that ends in this piece ends the text.
        """
        complete = []
        for start, piece in self._cut_pieces(text):
            ends = [(stop, stop.end_in(piece, may_stop)) for stop in self._stops]
            complete = [(start + end, start + end - len(stop.text), stop.text) for stop, end in ends if end is not None]
            if complete:
                break
        text, num_before = self._held + text, len(self._held)
        if complete:
            self._held = ""
            _, begin, self.found = min(complete)  # the first to be complete, however the text is cut into tokens
            return text[: num_before + begin]
        keep = max((stop.num_matched for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back, as no text follows."""
        held, self._held = self._held, ""
        return held

    def _cut_pieces(self, text: str) -> Iterator[tuple[int, str]]:
        """The pieces of the text in which stop strings count, each with its place."""
        start = 0
        for place, character in enumerate(text) if self._uncut else ():
            assert self._uncut is not None
            was_inside, is_inside = self._uncut.is_inside, self._uncut.take(character)
            if is_inside and not was_inside:
                yield start, text[start : place + 1]
                for stop in self._stops:
                    stop.num_matched = 0
            elif was_inside:
                start = place + 1
        if start < len(text) and not (self._uncut and self._uncut.is_inside):
            yield start, text[start:]


class _UncutPart:
    """Follows a text into its uncut part and out of it."""

    def __init__(self, part: Uncut) -> None:
        self.is_inside = False
        self._begins, self._end = [_Pattern(text) for text in part.begins], _Pattern(part.end) if part.end else None
        self._first = "" if part.is_first else None  # the text so far, if it may still be the beginning of the part

    def take(self, character: str) -> bool:
        """Follow the next character. Returns whether the text is inside the part after it."""
        if self.is_inside:
            self.is_inside = self._end is None or not self._end.ends_with(character)
        elif self._first is not None:
            self._first = (self._first + character).lstrip()
            self.is_inside = any(self._first.startswith(begin.text) for begin in self._begins)
            if not any(begin.text.startswith(self._first) for begin in self._begins):
                self._first, self._begins = None, []
        else:
            ends = [begin.ends_with(character) for begin in self._begins]  # all of them follow the text
            self.is_inside = any(ends)
        return self.is_inside


class _Pattern:
    """A text to be found, and how many of its first characters the text so far ends with.

    The automaton of Knuth, Morris and Pratt, built only as far as it is needed, so that the time is linear in the
    length of the text for any text and stop string.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = [0]  # of the first 1, 2 … characters: length of the longest proper prefix that is a suffix

    def end_in(self, more: str, counts: bool) -> int | None:
        """Number of characters of `more`, the next piece of text, after which the string is first complete.

        None if the string is not complete, or if `counts` is false.
        """
        for place, character in enumerate(more, 1):
            self.num_matched = self._next(self.num_matched, character)
            if self.num_matched == len(self.text):
                if counts:
                    return place
                self.num_matched = self._borders[-1]
        return None

    def ends_with(self, character: str) -> bool:
        """Whether the text is complete with its next character. The search then begins again."""
        is_complete = self.end_in(character, True) is not None
        if is_complete:
            self.num_matched = 0
        return is_complete

    def _next(self, num: int, character: str) -> int:
        while num and self.text[num] != character:
            num = self._borders[num - 1]
        num += self.text[num] == character
        if num > len(self._borders):  # the border of the last character follows from the one before
            border = self._borders[-1]
            while border and self.text[border] != character:
                border = self._borders[border - 1]
            self._borders.append(border + (self.text[border] == character))
        return num
