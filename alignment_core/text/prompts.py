"""Converts messages and principles to the token ids of each branch (docs/design.md, section 3).

The branches differ by the principle and by nothing else. What a user writes is data: the text of a control token
inside a message stays text, and template syntax in a message is not evaluated.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from linalign.alignment_core.errors import FIELD, InvalidRequest
from linalign.alignment_core.methods import METHODS, Method
from linalign.alignment_core.request import MAX_PRINCIPLES, Principle, Prompt
from linalign.alignment_core.text.chat_template import ChatTemplate, Rendering
from linalign.alignment_core.text.message_rewriting import Messages
from linalign.alignment_core.text.principle_place import Place, holds, new_mark, place_in
from linalign.alignment_core.text.safe_encoding import SafeEncoder
from linalign.alignment_core.text.safe_rendering import SafeChat, render_safely

Placement = Literal["system", "user"]
Message = Mapping[str, Any]  # {"role": …, "content": …}, and further keys that the template reads


class PromptBuilder:
    """Builds prompts with a tokenizer and its chat template. Its methods raise InvalidRequest for invalid prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> None:
        """max_tokens: The context length; texts with too many characters for it are refused before they are encoded."""
        self._tokenizer = tokenizer
        self._template, self._encoder = ChatTemplate(tokenizer), SafeEncoder(tokenizer)
        self._begins_with_bos = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
        self._vocab_size = max(tokenizer.get_vocab().values()) + 1
        longest = max(len(token) for token in tokenizer.get_vocab())  # bytes or characters; no token is longer
        self._max_tokens = max_tokens
        self._max_characters = max_tokens and max_tokens * longest

    def build(
        self,
        messages: Sequence[Message],
        principles: Sequence[Principle] = (),
        placement: Placement = "system",
        rendering: Rendering | None = None,
        method: Method = "linear",
    ) -> Prompt:
        """Token ids of every branch of a chat. Principles of weight 0 are left out if others have a weight above 0."""
        rendering = rendering or Rendering()
        self._validate(messages, principles, rendering)
        chat = render_safely(messages, rendering, self._template, self._encoder)
        self._refuse_if_too_long("messages", [chat.text])  # the template itself may write text
        principles = [principle for principle in principles if principle.weight > 0]
        principled = []
        if principles:
            with_text, place = self._place(chat, placement)
            for principle in principles:
                text = chat.escapes.apply(self._encoder.tokens.in_texts, principle.text)
                rendered = self._template.text(with_text(text), chat.rendering)
                principled.append(self._first_that_adds_text(chat.text, place, [rendered, place.with_principle(text)]))
        *branches, base = [self._encoder.encode(text, chat.escapes) for text in (*principled, chat.text)]
        return replace(_mixed(base, branches, principles, method), continues=rendering.continues)

    def text_ids(self, text: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a text, without a template. Control tokens in the text are encoded as control tokens."""
        ids: Sequence[int]
        if isinstance(text, str):
            self._refuse_if_too_long("text", [text])
            ids = self._tokenizer.encode(text)
        else:
            ids = text
            unknown = [id for id in ids if not 0 <= id < self._vocab_size]
            if unknown:
                raise InvalidRequest(f"the vocabulary has no token {unknown[0]}", "text")
        if not ids:
            raise InvalidRequest("prompt must not be empty", "text")
        return tuple(ids)

    def build_text(
        self,
        text: str | Sequence[int],
        principles: Sequence[Principle] = (),
        scores: bool = False,
        method: Method = "linear",
    ) -> Prompt:
        """Token ids of every branch of a text that the reply continues. A principle is a line before the text.

        scores: Whether the prompt is only the first token and the others are given tokens of the reply, so that
            their log-probabilities are reported.
        """
        ids = self.text_ids(text)
        self._validate_principles(principles)
        start = 1 if self._begins_with_bos and ids[0] == self._tokenizer.bos_token_id else 0
        end = 1 if scores else len(ids)
        base, given = ids[:end], ids[end:]

        def principled(principle: Principle) -> tuple[int, ...]:
            line = self._encoder.encode_text(principle.text + "\n", is_first=True)
            return (*base[:start], *line, *base[start:])

        principles = [principle for principle in principles if principle.weight > 0]
        mixed = _mixed(base, [principled(principle) for principle in principles], principles, method)
        return replace(mixed, given=given, continues=True)

    @property
    def variables(self) -> frozenset[str]:
        """Names of the template variables that a user may set: see `Rendering.variables`."""
        return self._template.variables

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template describes tools to the model itself."""
        return self._template.knows_tools

    def generation_prompt(self, rendering: Rendering | None = None) -> str:
        """The beginning of the reply that the template writes itself, such as its header and "<think>"."""
        return self._template.generation_prompt(rendering)

    def _validate(self, messages: Sequence[Message], principles: Sequence[Principle], rendering: Rendering) -> None:
        if not messages:
            raise InvalidRequest("messages must not be empty", "messages")
        for message in messages:
            role, content = message["role"], message.get("content")
            if not (isinstance(content, str) or (role == "assistant" and content is None)):
                raise InvalidRequest(f"the content of a message of the role {role} must be text", "messages")
        if rendering.continues and messages[-1]["role"] != "assistant":
            raise InvalidRequest("to continue the last message, its role must be assistant", "continues")
        for name in rendering.variables:
            if name not in self.variables:
                raise InvalidRequest(f"this model's chat template does not know {name}", f"variables.{name}")
        self._refuse_if_too_long(
            "messages",
            [message.get("content") or "" for message in messages] + [json.dumps(rendering.tools)],
            [principle.text for principle in principles],
        )
        if self._max_tokens is not None and len(messages) > self._max_tokens:
            raise InvalidRequest(
                f"{len(messages)} messages do not fit: the context holds {self._max_tokens} tokens",
                "messages",
                "too_long",
            )
        self._validate_principles(principles)

    def _first_that_adds_text(self, base: str, place: Place, candidates: Sequence[str]) -> str:
        """The first candidate that adds text to `base`, but no control token.

        A template may change a principle so that its text disappears, or becomes a control token together with the
        text around it. Raises InvalidRequest if that is so for all candidates.
        """
        tokens = self._encoder.control_tokens(place.before) + self._encoder.control_tokens(place.after)
        for text in candidates:
            adds_text = len(text) > len(place.before) + len(place.after) and holds(text, base)
            if adds_text and self._encoder.control_tokens(text) == tokens:
                return text
        raise InvalidRequest("this model's chat template does not insert this principle as plain text", "principles")

    def _place(self, chat: SafeChat, placement: Placement) -> tuple[Callable[[str], Messages], Place]:
        """Find where principles go in a chat.

        Returns a function that inserts a principle's text into the messages, and the place of that text in the
        rendered chat. Raises InvalidRequest if the template shows no principle without other changes.
        """
        mark = new_mark()
        messages = self._without_stripped_space(chat.text, chat.messages, chat.rendering)
        for with_text in self._insertions(messages, placement, chat.rendering):
            with contextlib.suppress(InvalidRequest):
                place = place_in(chat.text, self._template.text(with_text(mark), chat.rendering), mark)
                if place is not None:
                    return with_text, place
        raise InvalidRequest("this model's chat template has no place for a principle in these messages", "principles")

    def _without_stripped_space(self, base: str, messages: Messages, rendering: Rendering) -> Messages:
        """The messages without the white space that the template strips from them.

        Only messages next to which a principle may be placed: with the principle there, the template would no longer
        strip the space between both, and the branches would differ by more than the principle.
        """
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        beside = {0} if messages[0]["role"] == "system" else set[int]()
        for index in sorted({*beside, *users[:1], *users[-1:]}):
            for strip in (str.lstrip, str.rstrip):
                shorter = _changed(messages, index, strip)
                with contextlib.suppress(InvalidRequest):  # from a template that refuses an empty message
                    if shorter != messages and self._template.text(shorter, rendering) == base:
                        messages = shorter
        return messages

    def _insertions(
        self, messages: Messages, placement: Placement, rendering: Rendering
    ) -> Iterator[Callable[[str], Messages]]:
        """Functions that insert a principle's text into the messages, in order of preference."""
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if placement == "user":
            if not users:
                raise InvalidRequest(f"{FIELD} 'user' needs a user message", "placement")
            yield lambda text: _changed(messages, users[-1], lambda content: f"{content}\n{text}")
            return
        rest = messages
        if messages[0]["role"] == "system":
            appended, replaced = (
                lambda text: _changed(messages, 0, lambda content: f"{content}\n{text}"),
                lambda text: _changed(messages, 0, lambda _: text),
            )
            yield from (appended, replaced) if messages[0]["content"].strip() else (replaced, appended)
            rest = messages[1:]
        if default := self._template.default_system_text(rendering):
            yield lambda text: [{"role": "system", "content": f"{default}\n{text}"}, *rest]
        yield lambda text: [{"role": "system", "content": text}, *rest]
        if users:  # where templates without a system role put system text
            yield lambda text: _changed(messages, users[0], lambda content: f"{text}\n\n{content}")

    def _validate_principles(self, principles: Sequence[Principle]) -> None:
        if principles and not any(principle.weight for principle in principles):
            raise InvalidRequest("one of the principles must have a weight above 0", "principles")
        if len(principles) > MAX_PRINCIPLES:
            raise InvalidRequest(
                f"at most {MAX_PRINCIPLES} principles are allowed, got {len(principles)}", "principles"
            )
        self._refuse_if_too_long("prompt", [], [principle.text for principle in principles])
        if not all(self._tokenizer.encode(principle.text, add_special_tokens=False) for principle in principles):
            raise InvalidRequest("a principle adds no tokens to this model's prompt", "principles")

    def _refuse_if_too_long(self, field: str, contents: Sequence[str], principles: Sequence[str] = ()) -> None:
        """Refuse a prompt with more characters than the context can hold, before it is encoded."""
        length = sum(map(len, contents)) + max(map(len, principles), default=0)
        if self._max_characters is not None and length > self._max_characters:
            message = f"the prompt has {length} characters, but the context holds {self._max_tokens} tokens"
            raise InvalidRequest(message, field, "too_long")


def _mixed(
    base: tuple[int, ...], principled: Sequence[tuple[int, ...]], principles: Sequence[Principle], method: Method
) -> Prompt:
    """The prompt with these branches, without the base if the method does not need it. Raises InvalidRequest."""
    if not principles:
        return Prompt(principled=(base,))
    if base in principled:
        raise InvalidRequest("a principle adds no tokens to this model's prompt", "principles")
    total = sum(principle.weight for principle in principles)
    if not total < float("inf"):
        raise InvalidRequest("the weights of the principles are too large", "principles")
    ratios = tuple(principle.ratio for principle in principles)
    weights = tuple(principle.weight / total for principle in principles)
    needs_base = any(METHODS[method].coefficients(weights, ratios))
    return Prompt(tuple(principled), weights, ratios, base if needs_base else None, method=method)


def _changed(messages: Messages, index: int, change: Callable[[str], str]) -> Messages:
    """The messages with the content of one of them changed."""
    changed = {**messages[index], "content": change(messages[index]["content"])}
    return [*messages[:index], changed, *messages[index + 1 :]]
