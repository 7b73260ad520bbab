"""Stand-ins for control tokens in texts of clients, so that templates and tokenizers do not see the tokens."""

import re
import secrets
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Forbidden:
    """What is escaped in texts of clients. Replies that clients send back may hold <think> and the like."""

    in_texts: re.Pattern[str]
    in_replies: re.Pattern[str]


class Escapes:
    """Replaces control tokens in texts of clients by stand-ins that nobody can guess, and puts the tokens back."""

    def __init__(self) -> None:
        self._nonce = str(secrets.randbits(64))  # digits, which no template changes
        self._texts: list[str] = []

    @property
    def used(self) -> bool:
        return bool(self._texts)

    def apply(self, pattern: re.Pattern[str], text: str) -> str:
        return pattern.sub(self._stand_in, text)

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
        if not self.used:
            return text
        return re.sub(f"\ufdd0{self._nonce}-([0-9]+)\ufdd1", lambda match: self._texts[int(match[1])], text)

    def _stand_in(self, match: re.Match[str]) -> str:
        if match.lastgroup == "kept":
            return match[0]
        self._texts.append(match[0])
        return f"\ufdd0{self._nonce}-{len(self._texts) - 1}\ufdd1"
