"""Messages and principles to the token ids of each branch: DESIGN section 3.

The branches differ by the principle and by nothing else. What a user writes is data: a control
token's text inside a message stays text, and no template syntax in it is evaluated.
"""

import itertools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from alignment_core.sequence import MAX_PRINCIPLES, MAX_RATIO, InvalidRequest, Prompt

Placement = Literal["system", "user"]
Message = Mapping[str, str]  # {"role": …, "content": …}

DEFAULT_RATIO = 2.0


@dataclass(frozen=True, slots=True)
class Principle:
    """A preference in plain words. Raises InvalidRequest. `weight` is relative to the other principles'."""

    text: str
    weight: float = 1.0
    ratio: float = DEFAULT_RATIO

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InvalidRequest("principle must not be empty", "principle")
        if not 0 <= self.ratio <= MAX_RATIO:
            raise InvalidRequest(f"alignment_ratio must be in [0, {MAX_RATIO:g}], got {self.ratio}", "alignment_ratio")
        if not 0 <= self.weight < float("inf"):
            raise InvalidRequest(f"weight must be a finite number ≥ 0, got {self.weight}", "principle")


class PromptBuilder:
    """Renders chats with one tokenizer's own template. Raises InvalidRequest for what it can't render."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> None:
        """max_tokens: texts that can't be that short are refused before the work of encoding them."""
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: (id, token) for id, token in added.items()}
        self._any_added = _any_of(self._added)
        self._any_special = _any_of(text for text, (_, token) in self._added.items() if token.special)
        self._has_system_role = self._probe_system_role()
        self._trims = self._probe_trimming()
        longest = max(len(token) for token in tokenizer.get_vocab())  # bytes or characters: no token is longer
        self._max_characters = max_tokens and max_tokens * longest

    def build(
        self, messages: Sequence[Message], principles: Sequence[Principle] = (), placement: Placement = "system"
    ) -> Prompt:
        """Token ids of every branch. Principles of weight 0 take no part."""
        if not messages:
            raise InvalidRequest("messages must not be empty", "messages")
        self._refuse_what_is_far_too_long([m["content"] for m in messages], [p.text for p in principles])
        escapes = _Escapes()
        safe = [
            {
                "role": message["role"],
                # A reply of the model may hold tokens such as <think>; nobody's text may end a turn.
                "content": escapes.apply(
                    self._any_special if message["role"] == "assistant" else self._any_added, message["content"]
                ),
            }
            for message in messages
        ]
        if len(principles) > MAX_PRINCIPLES:
            raise InvalidRequest(
                f"there may be {MAX_PRINCIPLES} principles at most, got {len(principles)}", "principle"
            )
        principles = [principle for principle in principles if principle.weight > 0]
        for _ in range(3):  # templates may show the time, which must be the same for all branches
            base = self._encode(safe, escapes)
            prompt = self._branches(base, safe, principles, placement, escapes)
            if not principles or self._encode(safe, escapes) == base:
                break
        return prompt

    def _branches(
        self,
        base: tuple[int, ...],
        messages: list[dict[str, str]],
        principles: Sequence[Principle],
        placement: Placement,
        escapes: "_Escapes",
    ) -> Prompt:
        if not principles:
            return Prompt(principled=(base,))
        texts = [escapes.apply(self._any_added, principle.text) for principle in principles]
        total = sum(principle.weight for principle in principles)
        if not total < float("inf"):
            raise InvalidRequest("the weights of the principles are too large", "principle")
        ratios = tuple(principle.ratio for principle in principles)
        return Prompt(
            principled=tuple(self._encode(self._with_principle(messages, text, placement), escapes) for text in texts),
            weights=tuple(principle.weight / total for principle in principles),
            ratios=ratios,
            base=base if any(ratios) else None,
        )

    def _with_principle(self, messages: list[dict[str, str]], text: str, placement: Placement) -> list[dict[str, str]]:
        messages = [dict(message) for message in messages]
        if placement == "user":
            users = [message for message in messages if message["role"] == "user"]
            if not users:
                raise InvalidRequest("principle_placement 'user' needs a user message", "principle_placement")
            users[-1]["content"] = self._trimmed(users[-1]["content"]) + "\n" + text
        elif messages[0]["role"] == "system":
            messages[0]["content"] = _joined(self._trimmed(messages[0]["content"]), text)
        else:
            messages.insert(0, {"role": "system", "content": _joined(self._default_system_text(), text)})
        return messages

    def _refuse_what_is_far_too_long(self, contents: list[str], principles: list[str]) -> None:
        length = sum(map(len, contents)) + max(map(len, principles), default=0)
        if self._max_characters is not None and length > self._max_characters:
            raise InvalidRequest(
                f"the prompt has {length} characters, more than the context holds in any case", "messages"
            )

    def _trimmed(self, content: str) -> str:
        """Without the white space at the end that the template takes off when the principle is not there."""
        return content.rstrip() if self._trims else content

    def _probe_trimming(self) -> bool:
        try:
            padded, bare = (self._render([{"role": "user", "content": text}]) for text in ("Hello \n", "Hello"))
        except InvalidRequest:
            return False
        return padded == bare

    def _default_system_text(self) -> str:
        """What the template puts into the system block by itself when there is no system message."""
        if not self._has_system_role:
            return ""
        mark, user = "SYSTEM" + secrets.token_hex(8), {"role": "user", "content": "USER" + secrets.token_hex(8)}
        before, after = self._render([{"role": "system", "content": mark}, user]).split(mark, 1)
        default = self._render([user])
        fits = len(before) + len(after) <= len(default) and default.startswith(before) and default.endswith(after)
        return default[len(before) : len(default) - len(after)] if fits else ""

    def _probe_system_role(self) -> bool:
        mark = "SYSTEM" + secrets.token_hex(8)
        chat = [{"role": "system", "content": mark}, {"role": "user", "content": "Hello"}]
        try:
            return mark in self._render(chat)
        except InvalidRequest:
            return False

    def _encode(self, messages: list[dict[str, str]], escapes: "_Escapes") -> tuple[int, ...]:
        if not self._has_system_role:
            messages = _without_system_role(messages)
        rendered = self._render(messages)
        if not escapes.used:
            return tuple(self._tokenizer.encode(rendered, add_special_tokens=False))
        return tuple(self._encode_escaped(rendered, escapes))

    def _encode_escaped(self, rendered: str, escapes: "_Escapes") -> list[int]:
        """The control tokens that stand in `rendered` are the template's own; the escaped ones are text."""
        ids: list[int] = []
        pieces = re.split(f"({self._any_added.pattern})", rendered)
        for index in range(0, len(pieces), 2):
            text = pieces[index]
            if index > 0 and self._added[pieces[index - 1]][1].rstrip:
                text = text.lstrip()
            if index + 1 < len(pieces) and self._added[pieces[index + 1]][1].lstrip:
                text = text.rstrip()
            ids += self._encode_text(escapes.undo(text), is_first=index == 0)
            if index + 1 < len(pieces):
                ids.append(self._added[pieces[index + 1]][0])
        return ids

    def _encode_text(self, text: str, is_first: bool) -> list[int]:
        tokenizer = self._plain_tokenizer if is_first else self._inner_tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if self._added_ids.isdisjoint(ids):
            return ids
        # The vocabulary spells a control token as an ordinary piece too: cut behind its first character.
        cuts = [0, *(match.start() + 1 for match in self._any_added.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
        return [id for part in parts for id in self._inner_tokenizer.encode(part, add_special_tokens=False).ids]

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(id for id, _ in self._added.values())

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

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template can raise anything
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        assert isinstance(rendered, str)
        return rendered


class _Escapes:
    """Stand-ins for control tokens in users' texts, unguessable, so that templates and tokenizer pass them over."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(8)
        self._texts: list[str] = []

    @property
    def used(self) -> bool:
        return bool(self._texts)

    def apply(self, pattern: re.Pattern[str], text: str) -> str:
        return pattern.sub(self._stand_in, text)

    def undo(self, text: str) -> str:
        if not self.used:
            return text
        return re.sub(f"\ufdd0{self._nonce}-([0-9]+)\ufdd1", lambda match: self._texts[int(match[1])], text)

    def _stand_in(self, match: re.Match[str]) -> str:
        self._texts.append(match[0])
        return f"\ufdd0{self._nonce}-{len(self._texts) - 1}\ufdd1"


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in ordered) or r"(?!)")


def _joined(system: str, principle: str) -> str:
    return f"{system}\n{principle}" if system else principle


def _without_system_role(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """System text at the head of the next user message, a blank line between: where such templates' users put it."""
    folded: list[dict[str, str]] = []
    pending: list[str] = []
    for message in messages:
        if message["role"] == "system":
            pending.append(message["content"])
        elif message["role"] == "user" and pending:
            folded.append({"role": "user", "content": "\n\n".join([*pending, message["content"]])})
            pending = []
        else:
            folded.append(message)
    if pending:
        raise InvalidRequest(
            "this model has no system role, so a system message needs a user message after it", "messages"
        )
    return folded
