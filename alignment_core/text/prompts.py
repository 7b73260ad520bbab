"""Messages and principles to the token ids of each branch: DESIGN section 3.

The branches differ by the principle and by nothing else. What a user writes is data: a control
token's text inside a message stays text, and no template syntax in it is evaluated.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from linalign.alignment_core.decoding.methods import METHODS, Method
from linalign.alignment_core.errors import InvalidRequest
from linalign.alignment_core.request import MAX_PRINCIPLES, Principle, Prompt
from linalign.alignment_core.text.chat_template import ChatTemplate, Messages, Rendering
from linalign.alignment_core.text.principle_place import Place, holds, new_mark, place_in
from linalign.alignment_core.text.safe_encoding import SafeEncoder
from linalign.alignment_core.text.safe_rendering import SafeChat, render_safely

Placement = Literal["system", "user"]
Message = Mapping[str, Any]  # {"role": …, "content": …}, and what the template's own messages may have beside


class PromptBuilder:
    """Renders chats with one tokenizer's own template. Raises InvalidRequest for what it can't render."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> None:
        """max_tokens: texts that can't be that short are refused before the work of encoding them."""
        self._tokenizer = tokenizer
        self._template, self._encoder = ChatTemplate(tokenizer), SafeEncoder(tokenizer)
        self._begins_with_bos = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
        self._vocab_size = max(tokenizer.get_vocab().values()) + 1
        longest = max(len(token) for token in tokenizer.get_vocab())  # bytes or characters: no token is longer
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
        """Token ids of every branch. Principles of weight 0 take no part beside others."""
        rendering = rendering or Rendering()
        self._refuse(messages, principles, rendering)
        chat = render_safely(messages, rendering, self._template, self._encoder)
        self._refuse_far_too_long("messages", [chat.text])  # a template may write more than the messages
        principles = [principle for principle in principles if principle.weight > 0]
        principled = []
        if principles:
            with_text, place = self._place(chat, placement)
            for principle in principles:
                text = chat.escapes.apply(self._encoder.tokens.in_texts, principle.text)
                rendered = self._template.text(with_text(text), chat.rendering)
                principled.append(self._that_adds_text(chat.text, place, [rendered, place.with_principle(text)]))
        *branches, base = [self._encoder.encode(text, chat.escapes) for text in (*principled, chat.text)]
        return replace(_mixed(base, branches, principles, method), continues=rendering.continues)

    def text_ids(self, text: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a text without any template; control tokens in it are control tokens. Raises InvalidRequest."""
        ids: Sequence[int]
        if isinstance(text, str):
            self._refuse_far_too_long("text", [text])
            ids = self._tokenizer.encode(text)
        else:
            ids = text
            foreign = [id for id in ids if not 0 <= id < self._vocab_size]
            if foreign:
                raise InvalidRequest(f"the vocabulary has no token {foreign[0]}", "text")
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
        """Token ids of every branch of a text that goes on: a principle is a line before it.

        scores: all tokens but the first are given instead, so that their log-probabilities are reported.
        """
        ids = self.text_ids(text)
        self._refuse_principles(principles)
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
        """What the chat template knows beside the messages, for `Rendering.variables`."""
        return self._template.variables

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template tells the model of tools by itself."""
        return self._template.knows_tools

    def generation_prompt(self, rendering: Rendering | None = None) -> str:
        """What the template writes of the reply itself, such as its header and "<think>"."""
        return self._template.generation_prompt(rendering)

    def _refuse(self, messages: Sequence[Message], principles: Sequence[Principle], rendering: Rendering) -> None:
        if not messages:
            raise InvalidRequest("messages must not be empty", "messages")
        for message in messages:
            role, content = message["role"], message.get("content")
            if not (isinstance(content, str) or (role == "assistant" and content is None)):
                raise InvalidRequest(f"the content of a message of the role {role} must be a text", "messages")
        if rendering.continues and messages[-1]["role"] != "assistant":
            raise InvalidRequest("the last message must be the assistant's to be continued", "continues")
        for name in rendering.variables:
            if name not in self.variables:
                raise InvalidRequest(f"this model's chat template does not know {name}", f"variables.{name}")
        self._refuse_far_too_long(
            "messages",
            [message.get("content") or "" for message in messages] + [json.dumps(rendering.tools)],
            [principle.text for principle in principles],
        )
        if self._max_tokens is not None and len(messages) > self._max_tokens:
            raise InvalidRequest(
                f"{len(messages)} messages are more than the context holds tokens, which are {self._max_tokens}",
                "messages",
                "too_long",
            )
        self._refuse_principles(principles)

    def _that_adds_text(self, base: str, place: Place, candidates: Sequence[str]) -> str:
        """The first of the candidates that is the base with some text more, and no control token: templates may make
        more of a principle than of other texts, or less. Raises InvalidRequest.
        """
        tokens = self._encoder.control_tokens(place.before) + self._encoder.control_tokens(place.after)
        for text in candidates:
            adds_text = len(text) > len(place.before) + len(place.after) and holds(text, base)
            if adds_text and self._encoder.control_tokens(text) == tokens:
                return text
        raise InvalidRequest("this model's chat template makes something else of a principle", "principles")

    def _place(self, chat: SafeChat, placement: Placement) -> tuple[Callable[[str], Messages], Place]:
        """Where principles stand in a chat: a function that puts a text there in the messages, and the place in the
        rendered text. Raises InvalidRequest where the template does not show a principle without other changes.
        """
        mark = new_mark()
        messages = self._as_shown(chat.text, chat.messages, chat.rendering)
        for with_text in self._ways(messages, placement, chat.rendering):
            with contextlib.suppress(InvalidRequest):
                place = place_in(chat.text, self._template.text(with_text(mark), chat.rendering), mark)
                if place is not None:
                    return with_text, place
        raise InvalidRequest("this model's chat template has no place for a principle in these messages", "principles")

    def _as_shown(self, base: str, messages: Messages, rendering: Rendering) -> Messages:
        """Without the white space that the template takes off the ends of messages which a principle may stand beside:
        it would not take it off there.
        """
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        beside = {0} if messages[0]["role"] == "system" else set[int]()
        for index in sorted({*beside, *users[:1], *users[-1:]}):
            for strip in (str.lstrip, str.rstrip):
                shorter = _changed(messages, index, strip)
                with contextlib.suppress(InvalidRequest):  # of a template that wants to be told something
                    if shorter != messages and self._template.text(shorter, rendering) == base:
                        messages = shorter
        return messages

    def _ways(
        self, messages: Messages, placement: Placement, rendering: Rendering
    ) -> Iterator[Callable[[str], Messages]]:
        """To put a principle's text into the messages, the best first."""
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if placement == "user":
            if not users:
                raise InvalidRequest("{field} 'user' needs a user message", "placement")
            yield lambda text: _changed(messages, users[-1], lambda content: f"{content}\n{text}")
            return
        rest = messages
        if messages[0]["role"] == "system":
            behind, instead = (
                lambda text: _changed(messages, 0, lambda content: f"{content}\n{text}"),
                lambda text: _changed(messages, 0, lambda _: text),
            )
            yield from (behind, instead) if messages[0]["content"].strip() else (instead, behind)
            rest = messages[1:]
        if default := self._template.default_system_text(rendering):
            yield lambda text: [{"role": "system", "content": f"{default}\n{text}"}, *rest]
        yield lambda text: [{"role": "system", "content": text}, *rest]
        if users:  # where templates put system text that they have no role for
            yield lambda text: _changed(messages, users[0], lambda content: f"{text}\n\n{content}")

    def _refuse_principles(self, principles: Sequence[Principle]) -> None:
        if principles and not any(principle.weight for principle in principles):
            raise InvalidRequest("one of the principles must have a weight above 0", "principles")
        if len(principles) > MAX_PRINCIPLES:
            raise InvalidRequest(
                f"there may be {MAX_PRINCIPLES} principles at most, got {len(principles)}", "principles"
            )
        self._refuse_far_too_long("prompt", [], [principle.text for principle in principles])
        if not all(self._tokenizer.encode(principle.text, add_special_tokens=False) for principle in principles):
            raise InvalidRequest("a principle leaves no trace in this model's tokens", "principles")

    def _refuse_far_too_long(self, field: str, contents: Sequence[str], principles: Sequence[str] = ()) -> None:
        """Refuse what has more characters than the context can hold, before the work of encoding it."""
        length = sum(map(len, contents)) + max(map(len, principles), default=0)
        if self._max_characters is not None and length > self._max_characters:
            message = f"the prompt has {length} characters, more than the context holds in any case"
            raise InvalidRequest(message, field, "too_long")


def _mixed(
    base: tuple[int, ...], principled: Sequence[tuple[int, ...]], principles: Sequence[Principle], method: Method
) -> Prompt:
    """The branches of a prompt whose base branch is `base`. Raises InvalidRequest."""
    if not principles:
        return Prompt(principled=(base,))
    if base in principled:
        raise InvalidRequest("a principle leaves no trace in this model's tokens", "principles")
    total = sum(principle.weight for principle in principles)
    if not total < float("inf"):
        raise InvalidRequest("the weights of the principles are too large", "principles")
    ratios = tuple(principle.ratio for principle in principles)
    weights = tuple(principle.weight / total for principle in principles)
    needs_base = any(METHODS[method].coefficients(weights, ratios))
    return Prompt(tuple(principled), weights, ratios, base if needs_base else None, method=method)


def _changed(messages: Messages, index: int, change: Callable[[str], str]) -> Messages:
    """The same messages, but for the content of one."""
    changed = {**messages[index], "content": change(messages[index]["content"])}
    return [*messages[:index], changed, *messages[index + 1 :]]
