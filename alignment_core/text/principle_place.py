"""Where a principle stands in a rendered chat: found by a mark, so that the text around it is the base branch's."""

import secrets
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """The text before the principle and the text behind it, with what joins it to them."""

    before: str
    after: str

    def with_principle(self, text: str) -> str:
        return self.before + text + self.after


def new_mark() -> str:
    """Digits, which no template writes otherwise, and no client can guess."""
    return str(secrets.randbits(80))


def place_in(base: str, marked: str, mark: str) -> Place | None:
    """Where the mark is in `marked`, which is `base` rendered anew with a mark somewhere.

    None where the template shows no mark, or several, or changes anything else with it: `base` is in the result, whole
    and in order.
    """
    if marked.count(mark) != 1 or not holds(marked, base):
        return None
    return Place(*marked.split(mark))


def holds(text: str, base: str) -> bool:
    """Whether `text` is `base` with something put in at one place."""
    start = _common_beginning(base, text)
    end = _common_beginning(base[start:][::-1], text[start:][::-1])
    return start + end == len(base) < len(text)


def _common_beginning(a: str, b: str) -> int:
    """How many characters."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
