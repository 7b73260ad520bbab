"""Encodes text so that only the chat template's own control tokens become control tokens, and never those of users."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from linalign.alignment_core.text.escaping import Escapes, Forbidden

# The white space that Rust's tokenizers strip from the ends of a text: Python's, without U+001C to U+001F.
WHITE_SPACE = "".join(mark for mark in map(chr, range(0x3001)) if mark.isspace() and mark not in "\x1c\x1d\x1e\x1f")


class SafeEncoder:
    """Encodes rendered chats and users' texts with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: (id, token) for id, token in added.items()}
        special = [text for text, (_, token) in self._added.items() if token.special]
        harmless = _any_of(text for text in self._added if text not in special)
        marks = _any_of({mark for text in special for mark in re.findall(r"[^\w\s]", text)})
        self._any_added = _any_of(self._added)
        self.tokens = Forbidden(self._any_added, _any_of(special))
        # Only punctuation of control tokens: names of fields and functions consist of letters and digits.
        self.marks = Forbidden(marks, re.compile(f"(?P<kept>{harmless.pattern})|{marks.pattern}"))
        # A normalizer may turn look-alikes of a control token (full-width letters, say) into that token.
        normalises = tokenizer.backend_tokenizer.normalizer is not None
        self._has_look_alikes = normalises and any(token.normalized for token in added.values())

    def control_tokens(self, rendered: str) -> Counter[str]:
        """The number of occurrences of each control token in a rendered chat."""
        return Counter(self._any_added.findall(rendered))

    def encode(self, rendered: str, escapes: Escapes) -> tuple[int, ...]:
        """Token ids of a rendered chat. Its control tokens are the template's own; escaped ones are encoded as text."""
        if not (escapes.used or self._has_look_alikes):
            return tuple(self._tokenizer.encode(rendered, add_special_tokens=False))
        ids: list[int] = []
        pieces = re.split(f"({self._any_added.pattern})", rendered)
        for index in range(0, len(pieces), 2):
            text = pieces[index]
            if index > 0 and self._added[pieces[index - 1]][1].rstrip:
                text = text.lstrip(WHITE_SPACE)
            if index + 1 < len(pieces) and self._added[pieces[index + 1]][1].lstrip:
                text = text.rstrip(WHITE_SPACE)
            ids += self.encode_text(escapes.undo(text), is_first=index == 0)
            if index + 1 < len(pieces):
                ids.append(self._added[pieces[index + 1]][0])
        return tuple(ids)

    def encode_text(self, text: str, is_first: bool) -> list[int]:
        """Token ids of a text in which nothing is a control token. is_first: Whether it begins the prompt."""
        tokenizer = self._plain_tokenizer if is_first else self._inner_tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if self._added_ids.isdisjoint(ids):
            return ids
        # The vocabulary has a control token as an ordinary token too: cut the text after its first character.
        cuts = [0, *(match.start() + 1 for match in self._any_added.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        return [id for part in parts for id in self._cut(part)]

    def _cut(self, text: str) -> list[int]:
        """Token ids of a text, cut in halves until no token is a control token, however the vocabulary spells that."""
        ids: list[int] = self._inner_tokenizer.encode(text, add_special_tokens=False).ids
        if self._added_ids.isdisjoint(ids):
            return ids
        if len(text) == 1:
            return [id for id in ids if id not in self._added_ids]
        middle = len(text) // 2
        return [*self._cut(text[:middle]), *self._cut(text[middle:])]

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        """Ids of the added tokens, except the unknown token."""
        unknown = self._plain_tokenizer.encode("\U000fdead", add_special_tokens=False).ids
        return frozenset(id for id, _ in self._added.values()) - frozenset(unknown)

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        """The tokenizer without added tokens, so that nothing in a text is parsed as one."""
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state["added_tokens"], state["post_processor"] = [], None
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _inner_tokenizer(self) -> Tokenizer:
        """The plain tokenizer for text after a control token, where tokenizers like Llama 2's prepend no space."""
        state = self._plain_tokenizer.to_str()
        return Tokenizer.from_str(state.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in ordered) or r"(?!)")
