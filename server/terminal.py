"""Text of a server, which need not be ours, on its way to a terminal."""

import unicodedata


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(mark for mark in text if mark.isprintable() or mark in "\n\t" or unicodedata.category(mark) == "Zs")
