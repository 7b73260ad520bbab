"""Text with control tokens of a chat template's own, and words of users in which nothing is a control token."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from linalign.alignment_core.text.escaping import Escapes, Forbidden

# What Rust's tokenizers take for white space at the ends of a text; Python has U+001C to U+001F beside.
WHITE_SPACE = "".join(mark for mark in map(chr, range(0x3001)) if mark.isspace() and mark not in "\x1c\x1d\x1e\x1f")


class SafeEncoder:
    """Token ids of rendered chats and of users' texts, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: (id, token) for id, token in added.items()}
        special = [text for text, (_, token) in self._added.items() if token.special]
        harmless = _any_of(text for text in self._added if text not in special)
        marks = _any_of({mark for text in special for mark in re.findall(r"[^\w\s]", text)})
        self._any_added = _any_of(self._added)
        self.tokens = Forbidden(self._any_added, _any_of(special))
        # No letters and digits: the names of fields and functions consist of them.
        self.marks = Forbidden(marks, re.compile(f"(?P<kept>{harmless.pattern})|{marks.pattern}"))
        # Look-alikes of a control token (full-width letters, say) may be made into one before it is looked for.
        normalises = tokenizer.backend_tokenizer.normalizer is not None
        self._has_look_alikes = normalises and any(token.normalized for token in added.values())

    def control_tokens(self, rendered: str) -> Counter[str]:
        """How often each of them stands in a rendered chat."""
        return Counter(self._any_added.findall(rendered))

    def encode(self, rendered: str, escapes: Escapes) -> tuple[int, ...]:
        """The control tokens that stand in `rendered` are the template's own; the escaped ones are text."""
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
        """Of a text in which nothing is a control token. is_first: nothing stands before it."""
        tokenizer = self._plain_tokenizer if is_first else self._inner_tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if self._added_ids.isdisjoint(ids):
            return ids
        # The vocabulary spells a control token as an ordinary piece too: cut behind its first character.
        cuts = [0, *(match.start() + 1 for match in self._any_added.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        return [id for part in parts for id in self._cut(part)]

    def _cut(self, text: str) -> list[int]:
        """In halves as long as there is a control token in it, whatever it is spelled by."""
        ids: list[int] = self._inner_tokenizer.encode(text, add_special_tokens=False).ids
        if self._added_ids.isdisjoint(ids):
            return ids
        if len(text) == 1:
            return [id for id in ids if id not in self._added_ids]
        middle = len(text) // 2
        return [*self._cut(text[:middle]), *self._cut(text[middle:])]

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        """But for the one that stands for what the vocabulary lacks."""
        unknown = self._plain_tokenizer.encode("\U000fdead", add_special_tokens=False).ids
        return frozenset(id for id, _ in self._added.values()) - frozenset(unknown)

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        """The same tokenizer without any added token, so that nothing in a text is parsed as one."""
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state["added_tokens"], state["post_processor"] = [], None
        return Tokenizer.from_str(json.dumps(state))

    @cached_property
    def _inner_tokenizer(self) -> Tokenizer:
        """For text behind a control token, where such as Llama 2's put no space in front."""
        state = self._plain_tokenizer.to_str()
        return Tokenizer.from_str(state.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in ordered) or r"(?!)")
