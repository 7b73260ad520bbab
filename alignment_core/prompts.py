"""Messages and principles to the token ids of each branch: DESIGN section 3.

The branches differ by the principle and by nothing else. What a user writes is data: a control
token's text inside a message stays text, and no template syntax in it is evaluated.
"""

import copy
import itertools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.meta import find_undeclared_variables
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from alignment_core import template_clock
from alignment_core.errors import InvalidRequest
from alignment_core.methods import METHODS, Method
from alignment_core.request import MAX_PRINCIPLES, Principle, Prompt

Placement = Literal["system", "user"]
Message = Mapping[str, Any]  # {"role": …, "content": …}, and what the template's own messages may have beside

# Variables of templates that are not for users: they are set here, or by transformers.
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception"}
RESERVED |= {"bos_token", "eos_token", "pad_token", "unk_token", "strftime_now", "tojson"}
TOOLS_TEXT = """# Tools

You may call one or more functions to assist with the user query. Their signatures:
{}

For each function call, return a JSON object with its name and arguments inside <tool_call></tool_call> tags:
<tool_call>
{{"name": "function-name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Rendering:
    """How a template renders a chat.

    tools: functions in OpenAI's form. variables: of the template's own. continues: the last message, the
    assistant's, is the beginning of the reply. now: the time that templates show, the same in all branches.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    now: datetime = field(default_factory=datetime.now)


class PromptBuilder:
    """Renders chats with one tokenizer's own template. Raises InvalidRequest for what it can't render."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> None:
        """max_tokens: texts that can't be that short are refused before the work of encoding them."""
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        self._templates = self._parsed(tokenizer.chat_template)
        self._time_formats = template_clock.formats_of(self._templates)
        self._tokenizer = self._with_clock(tokenizer) if self._time_formats else tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: (id, token) for id, token in added.items()}
        self._any_added = _any_of(self._added)
        self._any_special = _any_of(text for text, (_, token) in self._added.items() if token.special)
        self._begins_with_bos = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
        self._has_system_role = self._probe_system_role()
        self._trims = self._probe_trimming()
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
        escapes = _Escapes()
        # A reply of the model may hold tokens such as <think>; nobody's text may end a turn.
        safe: list[dict[str, Any]] = [
            {
                **escapes.apply_to_all(
                    self._any_special if message["role"] == "assistant" else self._any_added, dict(message)
                ),
                "role": message["role"],
            }
            for message in messages
        ]
        rendering = replace(
            rendering,
            tools=escapes.apply_to_all(self._any_added, list(rendering.tools)),
            variables=escapes.apply_to_all(self._any_added, dict(rendering.variables)),
        )
        if rendering.tools and not self.knows_tools:
            safe = self._with_tools_as_text(safe, rendering)
            rendering = replace(rendering, tools=())
        principles = [principle for principle in principles if principle.weight > 0]
        base = self._encode(safe, escapes, rendering)
        prompt = self._branches(base, safe, principles, placement, escapes, rendering, method)
        return replace(prompt, continues=rendering.continues)

    def text_ids(self, text: str | Sequence[int]) -> tuple[int, ...]:
        """Token ids of a text without any template; control tokens in it are control tokens. Raises InvalidRequest."""
        ids: Sequence[int]
        if isinstance(text, str):
            self._refuse_what_is_far_too_long([text], [])
            ids = self._tokenizer.encode(text)
        else:
            ids = text
            foreign = [id for id in ids if not 0 <= id < self._vocab_size]
            if foreign:
                raise InvalidRequest(f"the vocabulary has no token {foreign[0]}", "prompt")
        if not ids:
            raise InvalidRequest("prompt must not be empty", "prompt")
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
            line = self._encode_text(principle.text + "\n", is_first=True)
            return (*base[:start], *line, *base[start:])

        principles = [principle for principle in principles if principle.weight > 0]
        mixed = _mixed(base, [principled(principle) for principle in principles], principles, method)
        return replace(mixed, given=given, continues=True)

    @cached_property
    def variables(self) -> frozenset[str]:
        """What the chat template knows beside the messages, for `Rendering.variables`."""
        return self._variables - RESERVED

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the chat template tells the model of tools by itself."""
        return "tools" in self._variables

    @cached_property
    def _variables(self) -> frozenset[str]:
        return frozenset().union(*map(find_undeclared_variables, self._templates))

    @staticmethod
    def _parsed(templates: str | dict[str, str]) -> list[jinja2.nodes.Template]:
        """Raises ValueError for what is no template."""
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
        try:
            return [
                environment.parse(text) for text in (templates.values() if isinstance(templates, dict) else [templates])
            ]
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template can't be parsed: {error}") from error

    @staticmethod
    def _with_clock(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The same tokenizer, whose templates show the time that they are told."""
        templates, tokenizer = tokenizer.chat_template, copy.copy(tokenizer)
        if isinstance(templates, dict):
            tokenizer.chat_template = {name: template_clock.held_still(text) for name, text in templates.items()}
        else:
            tokenizer.chat_template = template_clock.held_still(templates)
        return tokenizer

    def generation_prompt(self, rendering: Rendering | None = None) -> str:
        """What the template writes of the reply itself, such as its header and "<think>"."""
        chat = [{"role": "user", "content": "Hello"}]
        rendering = rendering or Rendering()
        without = self._apply(chat, rendering, add_generation_prompt=False)
        return self._apply(chat, rendering, add_generation_prompt=True).removeprefix(without)

    def _refuse(self, messages: Sequence[Message], principles: Sequence[Principle], rendering: Rendering) -> None:
        if not messages:
            raise InvalidRequest("messages must not be empty", "messages")
        self._refuse_principles(principles)
        if rendering.continues and messages[-1]["role"] != "assistant":
            raise InvalidRequest("the last message must be the assistant's to be continued", "continue_final_message")
        for name in rendering.variables:
            if name not in self.variables:
                param = f"chat_template_kwargs.{name}"
                raise InvalidRequest(f"this model's chat template does not know {name}", param)
        self._refuse_what_is_far_too_long(
            [message["content"] or "" for message in messages] + [json.dumps(rendering.tools)],
            [principle.text for principle in principles],
        )
        if self._max_tokens is not None and len(messages) > self._max_tokens:
            raise InvalidRequest(
                f"{len(messages)} messages are more than the context holds tokens, which are {self._max_tokens}",
                "messages",
            )

    def _branches(
        self,
        base: tuple[int, ...],
        messages: list[dict[str, Any]],
        principles: Sequence[Principle],
        placement: Placement,
        escapes: "_Escapes",
        rendering: Rendering,
        method: Method,
    ) -> Prompt:
        texts = [escapes.apply(self._any_added, principle.text) for principle in principles]
        principled = [
            self._encode(self._with_principle(messages, text, placement, rendering), escapes, rendering)
            for text in texts
        ]
        return _mixed(base, principled, principles, method)

    def _with_principle(
        self, messages: list[dict[str, Any]], text: str, placement: Placement, rendering: Rendering
    ) -> list[dict[str, Any]]:
        messages = [dict(message) for message in messages]
        if placement == "user":
            users = [message for message in messages if message["role"] == "user"]
            if not users:
                raise InvalidRequest("principle_placement 'user' needs a user message", "principle_placement")
            users[-1]["content"] = self._trimmed(users[-1]["content"]) + "\n" + text
        elif messages[0]["role"] == "system":
            messages[0]["content"] = _joined(self._trimmed(messages[0]["content"]), text)
        else:
            messages.insert(0, {"role": "system", "content": _joined(self._default_system_text(rendering), text)})
        return messages

    def _with_tools_as_text(self, messages: list[dict[str, Any]], rendering: Rendering) -> list[dict[str, Any]]:
        text = TOOLS_TEXT.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in rendering.tools))
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        else:
            system = self._default_system_text(rendering)
        return [{"role": "system", "content": f"{system}\n\n{text}" if system else text}, *messages]

    def _refuse_principles(self, principles: Sequence[Principle]) -> None:
        if principles and not any(principle.weight for principle in principles):
            raise InvalidRequest("one of the principles must have a weight above 0", "principle")
        if len(principles) > MAX_PRINCIPLES:
            raise InvalidRequest(
                f"there may be {MAX_PRINCIPLES} principles at most, got {len(principles)}", "principle"
            )

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

    def _default_system_text(self, rendering: Rendering) -> str:
        """What the template puts into the system block by itself when there is no system message."""
        if not self._has_system_role:
            return ""
        mark, user = "SYSTEM" + secrets.token_hex(8), {"role": "user", "content": "USER" + secrets.token_hex(8)}
        rendering = replace(rendering, continues=False)
        before, after = self._render([{"role": "system", "content": mark}, user], rendering).split(mark, 1)
        default = self._render([user], rendering)
        fits = len(before) + len(after) <= len(default) and default.startswith(before) and default.endswith(after)
        return default[len(before) : len(default) - len(after)] if fits else ""

    def _probe_system_role(self) -> bool:
        mark = "SYSTEM" + secrets.token_hex(8)
        chat = [{"role": "system", "content": mark}, {"role": "user", "content": "Hello"}]
        try:
            return mark in self._render(chat)
        except InvalidRequest:
            return False

    def _encode(self, messages: list[dict[str, Any]], escapes: "_Escapes", rendering: Rendering) -> tuple[int, ...]:
        if not self.knows_tools:
            messages = _without_tool_messages(messages)
        if not self._has_system_role:
            messages = _without_system_role(messages)
        rendered = self._render(messages, rendering)
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

    def _render(self, messages: list[dict[str, Any]], rendering: Rendering | None = None) -> str:
        rendering = rendering or Rendering()
        return self._apply(messages, rendering, add_generation_prompt=not rendering.continues)

    def _apply(self, messages: list[dict[str, Any]], rendering: Rendering, add_generation_prompt: bool) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=list(rendering.tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=rendering.continues,
                **rendering.variables,
                **template_clock.variables(self._time_formats, rendering.now),
            )
        except Exception as error:  # a template can raise anything
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        assert isinstance(rendered, str)
        return rendered


class _Generation(jinja2.ext.Extension):
    """transformers' tag for what the assistant says; here it only has to be parsed."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's way

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _mixed(
    base: tuple[int, ...], principled: Sequence[tuple[int, ...]], principles: Sequence[Principle], method: Method
) -> Prompt:
    """The branches of a prompt whose base branch is `base`. Raises InvalidRequest."""
    if not principles:
        return Prompt(principled=(base,))
    total = sum(principle.weight for principle in principles)
    if not total < float("inf"):
        raise InvalidRequest("the weights of the principles are too large", "principle")
    ratios = tuple(principle.ratio for principle in principles)
    weights = tuple(principle.weight / total for principle in principles)
    needs_base = any(METHODS[method].coefficients(weights, ratios))
    return Prompt(tuple(principled), weights, ratios, base if needs_base else None, method=method)


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

    def apply_to_all(self, pattern: re.Pattern[str], value: Any) -> Any:
        """The same for every string inside lists and dictionaries."""
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
        self._texts.append(match[0])
        return f"\ufdd0{self._nonce}-{len(self._texts) - 1}\ufdd1"


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in ordered) or r"(?!)")


def _joined(system: str, principle: str) -> str:
    return f"{system}\n{principle}" if system else principle


def _without_tool_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For templates that know nothing of tools: calls and results as text, in the form of Hermes and Qwen."""
    told: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            told.append({"role": "user", "content": content})
        elif message.get("tool_calls"):
            calls = [
                f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
                for call in message["tool_calls"]
            ]
            told.append({"role": "assistant", "content": "\n".join([*filter(None, [message["content"]]), *calls])})
        else:
            told.append(message)
    return told


def _without_system_role(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System text at the head of the next user message, a blank line between: where such templates' users put it."""
    folded: list[dict[str, Any]] = []
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
