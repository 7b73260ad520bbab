"""Finds where a template puts a principle in a rendered chat.

The chat is rendered with a random marker in place of the principle, and compared with the base branch's text.
"""

import secrets
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """The rendered text before and after the principle, separators included."""

    before: str
    after: str

    def with_principle(self, text: str) -> str:
        return self.before + text + self.after


def new_mark() -> str:
    """A new marker: digits that no template writes by itself and no client can guess."""
    return str(secrets.randbits(80))


def place_in(base: str, marked: str, mark: str) -> Place | None:
    """The text before and after the marker.

    base: The rendered chat.
    marked: The same chat, rendered with a marker in one of its messages.

    None if the marker is not in `marked` exactly once, or if `marked` differs from `base` anywhere else.
    """
    if marked.count(mark) != 1 or not holds(marked, base):
        return None
    return Place(*marked.split(mark))


def holds(text: str, base: str) -> bool:
    """Whether `text` is `base` with additional text inserted at one position."""
    start = _common_prefix_length(base, text)
    end = _common_prefix_length(base[start:][::-1], text[start:][::-1])
    return start + end == len(base) < len(text)


def _common_prefix_length(a: str, b: str) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
