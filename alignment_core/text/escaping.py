"""Escapes control tokens in texts from clients, so that templates and tokenizers do not see them."""

import re
import secrets
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Forbidden:
    """Patterns of what is escaped in texts from clients."""

    in_texts: re.Pattern[str]
    in_replies: re.Pattern[str]  # assistant messages that clients send back; <think> and the like are allowed there


class Escapes:
    """Replaces control tokens in texts from clients by placeholders that no client can guess, and restores them."""

    def __init__(self) -> None:
        self._nonce = str(secrets.randbits(64))  # digits, because no template changes digits
        self._texts: list[str] = []  # the replaced texts; a placeholder has the index of its text

    @property
    def used(self) -> bool:
        return bool(self._texts)

    def apply(self, pattern: re.Pattern[str], text: str) -> str:
        """The text with placeholders for all matches of the pattern, except for its group `kept`."""
        return pattern.sub(self._placeholder, text)

    def apply_to_all(self, pattern: re.Pattern[str], value: Any) -> Any:
        """`apply` to every string inside lists and dictionaries."""
        match value:
            case str():
                return self.apply(pattern, value)
            case list():
                return [self.apply_to_all(pattern, item) for item in value]
            case dict():
                return {self.apply(pattern, key): self.apply_to_all(pattern, item) for key, item in value.items()}
        return value

    def undo(self, text: str) -> str:
        """The text with the replaced texts in place of their placeholders."""
        if not self.used:
            return text
        return re.sub(f"\ufdd0{self._nonce}-([0-9]+)\ufdd1", lambda match: self._texts[int(match[1])], text)

    def _placeholder(self, match: re.Match[str]) -> str:
        if match.lastgroup == "kept":
            return match[0]
        self._texts.append(match[0])
        return f"\ufdd0{self._nonce}-{len(self._texts) - 1}\ufdd1"
