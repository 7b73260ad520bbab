"""Makes text of a server, which may be hostile, safe for a terminal."""

import unicodedata


def printable(text: str) -> str:
    """The text without control characters, which a terminal would execute."""
    return "".join(mark for mark in text if mark.isprintable() or mark in "\n\t" or unicodedata.category(mark) == "Zs")
