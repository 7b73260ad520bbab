"""Renders messages to text with a tokenizer's chat template, whether or not it supports tools and system messages."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase

from linalign.alignment_core.errors import InvalidRequest
from linalign.alignment_core.text import template_clock
from linalign.alignment_core.text.message_rewriting import (
    Messages,
    described,
    with_known_results,
    with_object_arguments,
    with_reasoning_as_content,
    with_single_calls,
    with_text_arguments,
    without_defaults,
    without_system_role,
    without_tool_messages,
)
from linalign.alignment_core.text.principle_place import new_mark

# Template variables that users cannot set: this file or transformers sets them.
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
    """How a template renders a chat."""

    tools: Sequence[Mapping[str, Any]] = ()  # functions in OpenAI's format
    variables: Mapping[str, Any] = field(default_factory=dict)  # the template's own: see `ChatTemplate.variables`
    continues: bool = False  # whether the last message, which is the assistant's, is the beginning of the reply
    now: datetime = field(default_factory=datetime.now)  # the time that the template shows, the same in all branches


class ChatTemplate:
    """The chat template of a tokenizer. Its methods raise InvalidRequest if the template fails on the messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError if the tokenizer has no template, or one that can't be parsed."""
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        self._templates = _parsed(tokenizer.chat_template)
        self._time_formats = template_clock.formats_of(self._templates)
        self._tokenizer = _with_clock(tokenizer) if self._time_formats else tokenizer
        self._has_system_role = self._probe_system_role()

    def text(self, messages: Messages, rendering: Rendering) -> str:
        """The rendered chat. Tool and system messages are rewritten if the template does not support them."""
        messages = self._with_shown_calls(messages) if self.knows_tools else without_tool_messages(messages)
        if not self._has_system_role:
            messages = without_system_role(messages)
        elif not self._shows_later_system_texts:
            messages = [*messages[:1], *without_system_role(messages[1:])]
        return self._render(messages, self._completed(rendering))

    def _with_shown_calls(self, messages: Messages) -> Messages:
        """Rewrite calls so that the template shows all that they say."""
        if not self._shows_text_arguments:
            messages = with_object_arguments(messages)
        elif not self._shows_object_arguments:
            messages = with_text_arguments(messages)
        if not self._takes_results_without_calls:
            messages = with_known_results(messages)
        if not self._shows_every_call:
            messages = with_single_calls(messages)
        if not self._takes_reasoning_beside_content:
            messages = with_reasoning_as_content(messages)
        return messages

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of the variables that the template reads and a user may set: see `Rendering.variables`."""
        return self._variables - RESERVED

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template reads `tools`, so that it describes them to the model itself."""
        return "tools" in self._variables

    @cached_property
    def _shows_text_arguments(self) -> bool:
        """Whether the template shows arguments of calls that are a text instead of an object."""
        mark = new_mark()
        return mark in self._text_of_calls([mark])

    @cached_property
    def _shows_object_arguments(self) -> bool:
        """Whether the template shows arguments of calls that are an object."""
        mark = new_mark()
        return mark in self._text_of_calls([{mark: 1}])

    @cached_property
    def _takes_results_without_calls(self) -> bool:
        """Whether the template takes a result without its call, as in histories that were shortened."""
        return self._takes([{"role": "tool", "tool_call_id": "call00000", "content": "1"}]) or not self._takes([])

    @cached_property
    def _shows_later_system_texts(self) -> bool:
        """Whether the template shows a system message that is not the first message."""
        mark, user = new_mark(), {"role": "user", "content": "Hello"}
        try:
            return mark in self._render([user, {"role": "system", "content": mark}, user], Rendering())
        except InvalidRequest:
            return False

    @cached_property
    def _shows_every_call(self) -> bool:
        """Whether the template shows all calls of a message; gpt-oss's shows the first one."""
        mark = new_mark()
        if self._shows_object_arguments:
            return mark in self._text_of_calls([{}, {mark: 1}])
        return mark in self._text_of_calls(["{}", mark]) or not self._shows_text_arguments

    @cached_property
    def _takes_reasoning_beside_content(self) -> bool:
        """Whether the template takes a call together with both; gpt-oss's refuses them."""
        arguments: Any = {} if self._shows_object_arguments else "{}"
        more = {"content": new_mark(), "reasoning_content": new_mark()}
        return bool(self._text_of_calls([arguments], **more)) or not self._text_of_calls([arguments])

    def _text_of_calls(self, arguments: Sequence[Any], **message: Any) -> str:
        """A rendered message with calls that have these arguments; "" if the template refuses the message."""
        calls = [{"id": "call00000", "type": "function", "function": {"name": "f", "arguments": a}} for a in arguments]
        user, reply = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "", "tool_calls": calls}
        try:
            return self._render([user, {**reply, **message}], Rendering())
        except InvalidRequest:
            return ""

    def _completed(self, rendering: Rendering) -> Rendering:
        """With descriptions of all tools if the template needs them, and without defaults that it refuses."""
        if not rendering.tools or not self.knows_tools or self._takes_tools_without_description:
            return rendering
        tools = [described(tool) for tool in rendering.tools]
        return replace(rendering, tools=tools if self._takes([], tools) else without_defaults(tools))

    @cached_property
    def _takes_tools_without_description(self) -> bool:
        """Whether the template does not need descriptions of tools."""
        function: dict[str, Any] = {"name": "f", "parameters": {"type": "object", "properties": {}}}
        tool = {"type": "function", "function": function}
        return self._takes([], [tool]) or not self._takes([], [described(tool)])

    def _takes(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> bool:
        """Whether the template takes tools, and messages behind one of the user."""
        try:
            return bool(self._render([{"role": "user", "content": "Hello"}, *messages], Rendering(tools)))
        except InvalidRequest:
            return False

    @cached_property
    def _variables(self) -> frozenset[str]:
        return frozenset().union(*map(find_undeclared_variables, self._templates))

    def generation_prompt(self, rendering: Rendering | None = None) -> str:
        """The beginning of the reply that the template writes itself, such as its header and "<think>"."""
        chat = [{"role": "user", "content": "Hello"}]
        rendering = self._completed(rendering or Rendering())
        without = self._apply(chat, rendering, add_generation_prompt=False)
        return self._apply(chat, rendering, add_generation_prompt=True).removeprefix(without)

    def default_system_text(self, rendering: Rendering) -> str:
        """The text that the template writes into the system block when there is no system message; "" if none.

        Found by rendering a chat with a marked system message and one without it, and comparing both.
        """
        if not self._has_system_role:
            return ""
        mark, user = new_mark(), {"role": "user", "content": new_mark()}
        rendering = replace(self._completed(rendering), continues=False)
        try:
            default = self._render([user], rendering)
            shown = self._render([{"role": "system", "content": mark}, user], rendering)
        except InvalidRequest:  # the template requires other messages than these
            return ""
        before, separator, after = shown.partition(mark)
        fits = len(before) + len(after) <= len(default) and default.startswith(before) and default.endswith(after)
        return default[len(before) : len(default) - len(after)] if separator and fits else ""

    def with_tools(self, messages: Messages, rendering: Rendering) -> tuple[Messages, Rendering]:
        """Move the tools into the text of the system message if the template does not support tools."""
        if not rendering.tools or self.knows_tools:
            return messages, rendering
        text = TOOLS_TEXT.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in rendering.tools))
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        else:
            system = self.default_system_text(rendering)
        content = f"{system}\n\n{text}" if system else text
        return [{"role": "system", "content": content}, *messages], replace(rendering, tools=())

    def _probe_system_role(self) -> bool:
        mark = new_mark()
        chat = [{"role": "system", "content": mark}, {"role": "user", "content": "Hello"}]
        try:
            return mark in self._render(chat, Rendering())
        except InvalidRequest:
            return False

    def _render(self, messages: Messages, rendering: Rendering) -> str:
        return self._apply(messages, rendering, add_generation_prompt=not rendering.continues)

    def _apply(self, messages: Messages, rendering: Rendering, add_generation_prompt: bool) -> str:
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
        except Exception as error:  # templates may raise any exception
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        assert isinstance(rendered, str)
        return rendered


class _Generation(jinja2.ext.Extension):
    """Parses transformers' tag around the assistant's text; parsing is all that this file needs."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 defines it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _parsed(templates: str | dict[str, str]) -> list[jinja2.nodes.Template]:
    """The syntax trees of the templates. Raises ValueError if one can't be parsed."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    texts = templates.values() if isinstance(templates, dict) else [templates]
    try:
        return [environment.parse(text) for text in texts]
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template can't be parsed: {error}") from error


def _with_clock(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer whose templates show the time of `Rendering.now`."""
    templates, tokenizer = tokenizer.chat_template, copy.copy(tokenizer)
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: template_clock.held_still(text) for name, text in templates.items()}
    else:
        tokenizer.chat_template = template_clock.held_still(templates)
    return tokenizer
