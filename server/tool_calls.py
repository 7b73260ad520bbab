"""Finds reasoning and tool calls in replies while their text arrives.

transformers' ResponseParser finds the marked regions, with the tokenizer's own response template if there is one.
"""

import json
import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser

from linalign.alignment_core.request import Uncut
from linalign.server.deltas import Delta, arguments_delta, call_start, whole
from linalign.server.harmony import BODY, is_harmony
from linalign.server.reasoning import THINKING, thinking_start

VERBATIM = {"strip": False}


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family of models writes calls: `begin`, JSON objects with `separator` between them, `end`.

    region: The region of calls, for transformers' parser. arguments: The key of the arguments in the JSON object.
    uncut: The part of a reply with calls that stop strings do not end.
    """

    region: Mapping[str, Any]
    uncut: Uncut
    begin: str
    end: str
    separator: str
    arguments: str = "arguments"
    id_length: int = 24


HERMES = CallFormat(
    {"open": "<tool_call>", "close": "</tool_call>"},
    Uncut(("<tool_call>",), "</tool_call>"),
    "<tool_call>\n",
    "\n</tool_call>",
    "\n</tool_call>\n<tool_call>\n",
)
LLAMA = CallFormat(
    {"open_pattern": r'^\s{0,16}+(?:<\|python_tag\|>)?+(?=\s{0,16}+\{\s{0,16}+")'},
    Uncut(("{", "<|python_tag|>"), is_first=True),
    "",
    "",
    "; ",
    "parameters",
)
HARMONY = CallFormat(  # calls are not in regions: see harmony.py
    {}, Uncut((" to=functions.",), "<|call|>"), BODY, "", ""
)
MISTRAL = CallFormat({"open": "[TOOL_CALLS]"}, Uncut(("[TOOL_CALLS]",)), "[TOOL_CALLS][", "]", ", ", id_length=9)


def call_format(tokenizer: PreTrainedTokenizerBase) -> CallFormat:
    """The format that the chat template uses; Hermes for templates without tools."""
    template = str(tokenizer.chat_template)
    if is_harmony(tokenizer):
        return HARMONY
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" not in template and ("python_tag" in template or "ipython" in template):
        return LLAMA
    return HERMES


PIECE = 256  # characters
MIN_MARK = 3  # characters that tell the beginning of a mark from other text
CALL_BEGIN = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)')  # of a call that is JSON without a mark
# Errors of an invalid region of a tokenizer's own template. The rest of the reply is then text.
BROKEN = (ValueError, RecursionError)


class ReplyParser:
    """Parses the text of one reply to the deltas of its message.

    generation_prompt: The part of the reply that the template has already written. tools: The callable tools.
    max_calls: Further calls are dropped. only_calls: Whether the reply must consist of calls.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation_prompt: str,
        tools: Sequence[Mapping[str, Any]],
        max_calls: float = math.inf,
        only_calls: bool = False,
    ) -> None:
        self._format = call_format(tokenizer)
        own = getattr(tokenizer, "response_template", None)
        self._is_own, self._has_tools = own is not None, bool(tools)
        if not self._is_own:
            generation_prompt = generation_prompt[thinking_start(generation_prompt) :]
        self._parser = ResponseParser(
            own or _template(tokenizer, self._format, bool(tools)), generation_prompt, tools=list(tools)
        )
        self._num_calls, self._max_calls = 0, max_calls
        self._min_mark = 1 if only_calls else MIN_MARK
        # Where no mark begins a call, only the name of a function tells it from other JSON.
        self._names = {tool["function"]["name"] for tool in tools} if self._format is LLAMA else None
        self._ended = self._is_broken = False
        self._scanner: _CallScanner | None = None
        self._raw: list[str] = []
        self._marked = any(event["field"] != "content" for event in self._parser.initial_events)
        self._trims = self._marked  # the white space between a mark and the text after it

    def feed(self, text: str) -> list[Delta]:
        # The parser gets the text in pieces, because it searches its whole buffer for every mark; and letter by letter
        # if it may raise, so that it raises at the end of a mark.
        size, deltas = 1 if self._is_own else PIECE, list[Delta]()
        for start in range(0, len(text), size):
            if self._is_broken:
                return [*deltas, {"content": text[start:]}]
            try:
                deltas += self._deltas(self._parser.feed(text[start : start + size]))
            except BROKEN:
                self._is_broken = True
        return deltas

    def finish(self) -> list[Delta]:
        self._ended = True
        try:
            deltas = [] if self._is_broken else self._deltas(self._parser.finalize()[1])
        except BROKEN:
            return []
        if not self._is_own and self._has_tools and deltas and "content" in deltas[-1]:
            text = self._without_begun_mark(deltas[-1]["content"])
            deltas[-1:] = [{"content": text}] if text else []
        return deltas

    def _without_begun_mark(self, text: str) -> str:
        """The text without the beginning of a mark at its end."""
        mark = self._format.region.get("open", "")
        sizes = range(len(mark) - 1, self._min_mark - 1, -1)
        return next((text[:-size] for size in sizes if text.endswith(mark[:size])), text)

    def _deltas(self, events: list[dict[str, Any]]) -> list[Delta]:
        deltas = [delta for event in events for delta in self._of(event)]
        return [delta for delta in deltas if all(c["index"] < self._max_calls for c in delta.get("tool_calls", ()))]

    def _of(self, event: dict[str, Any]) -> list[Delta]:
        field, kind = event["field"], event["type"]
        self._marked |= field != "content"
        if field == "tool_calls":
            return self._of_own_call(event) if self._is_own else self._of_call(event)
        if kind == "region_open":
            self._trims = self._marked
        if kind != "region_chunk":
            return []
        text = event["text"].lstrip() if self._trims else event["text"]
        self._trims = self._trims and not text
        name = "content" if field == "content" else "reasoning_content"
        return [{name: text}] if text else []

    def _of_call(self, event: dict[str, Any]) -> list[Delta]:
        if event["type"] == "region_open":
            self._scanner, self._raw = _CallScanner(self._format, self._num_calls, self._names), []
            return []
        assert self._scanner is not None
        if event["type"] == "region_chunk":
            self._raw.append(event["text"])
            return self._scanner.feed(event["text"])
        if self._scanner.num_calls == self._num_calls:  # not a call after all
            region, raw = self._format.region, "".join(self._raw)
            if self._ended and self._may_become_call(raw):
                return []
            close = "" if self._ended else region.get("close", "")
            return [{"content": f"{region.get('open', '')}{raw}{close}"}]
        self._num_calls = self._scanner.num_calls
        return []

    def _may_become_call(self, raw: str) -> bool:
        """Whether the beginning of a region may be the beginning of a call, in which no name is complete."""
        assert self._scanner is not None
        if self._names is None:
            return not raw.strip() or raw.lstrip()[0] in "{["
        begun = CALL_BEGIN.match(raw)
        return bool(begun and self._scanner.is_open and any(name.startswith(begun[1]) for name in self._names))

    def _of_own_call(self, event: dict[str, Any]) -> list[Delta]:
        if event["type"] != "region_close":
            return []
        values = event["value"] if isinstance(event["value"], list) else [event["value"]]
        deltas = []
        for value in values:
            function = value.get("function", value) if isinstance(value, dict) else None
            if isinstance(function, dict) and isinstance(function.get("name"), str):
                arguments = whole(json.dumps(function.get("arguments") or {}, ensure_ascii=False))
                name = whole(function["name"])
                deltas += [
                    call_start(self._num_calls, name, self._format.id_length),
                    arguments_delta(self._num_calls, arguments),
                ]
                self._num_calls += 1
        return deltas


def _template(tokenizer: PreTrainedTokenizerBase, form: CallFormat, has_tools: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"content": {"content": "text", "content_args": VERBATIM}}
    for begin, end in THINKING.items():
        if begin in str(tokenizer.chat_template):
            fields["thinking"] = {"open": begin, "close": end, "content_args": VERBATIM, "repeats": True}
    if has_tools:
        fields["tool_calls"] = {**form.region, "content_args": VERBATIM, "repeats": True}
    return {"start_anchor_pattern": "^", "fields": fields}


class _CallScanner:
    """Finds the name and the arguments of calls in JSON text while it arrives."""

    def __init__(self, form: CallFormat, num_calls: int, names: Container[str] | None) -> None:
        """names: The names of functions; None if any name is one."""
        self.num_calls = num_calls  # calls so far, including those of other regions
        self._format, self._names = form, names
        self._depth = 0
        self._reset()

    def _reset(self) -> None:
        self._string: list[str] = []
        self._in_string = self._escaped = False
        self._key: str | None = None
        self._value: list[str] = []
        self._begin = ""  # of the value: its first character that is no white space
        self._name: str | None = None
        self._held: list[str] = []
        self._has_arguments = False

    @property
    def is_open(self) -> bool:
        """Whether a JSON object has begun and not ended."""
        return self._depth > 0

    def feed(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        for character in text:
            deltas += self._take(character)
        return _merged(deltas)

    def _take(self, c: str) -> list[Delta]:
        if self._depth == 0:  # between objects
            if c == "{":
                self._reset()
                self._depth = 1
            return []
        if self._in_string:
            self._string.append(c)
            if self._escaped:
                self._escaped = False
            elif c == "\\":
                self._escaped = True
            elif c == '"':
                self._in_string = False
        elif c == '"':
            self._in_string, self._string = True, [c]
        elif c in "{[":
            self._depth += 1
        elif c in "}]":
            self._depth -= 1
            if self._depth == 0:
                return [*self._end_member(), *self._end_call()]
        elif self._depth == 1 and c == ":" and self._key is None:
            self._key, self._value, self._begin = _unquoted("".join(self._string)), [], ""
            return []
        elif self._depth == 1 and c == ",":
            return self._end_member()
        if self._key is None:
            return []
        self._value.append(c)
        self._begin = self._begin or c.strip()
        return self._arguments(c) if self._key in ("arguments", "parameters") else []

    def _arguments(self, c: str) -> list[Delta]:
        if self._begin in ("", '"'):
            return []  # arguments as a string, see _end_member, or not begun
        self._has_arguments = True
        self._held.append(c)
        return self._flush()

    def _flush(self) -> list[Delta]:
        if self._name is None or not self._held:
            return []
        held, self._held = "".join(self._held), []
        return [arguments_delta(self.num_calls - 1, held)]

    def _end_member(self) -> list[Delta]:
        key, value, self._key = self._key, "".join(self._value).strip(), None
        if key == "name" and self._name is None and (name := _unquoted(value)):
            if self._names is not None and name not in self._names:
                return []
            self._name = name
            self.num_calls += 1
            return [call_start(self.num_calls - 1, name, self._format.id_length), *self._flush()]
        if key in ("arguments", "parameters") and value.startswith('"'):
            self._has_arguments = True
            self._held.append(_unquoted(value) or "")
            return self._flush()
        return []

    def _end_call(self) -> list[Delta]:
        return [] if self._name is None or self._has_arguments else [arguments_delta(self.num_calls - 1, "{}")]


def _unquoted(text: str) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return whole(value) if isinstance(value, str) else None


def _merged(deltas: list[Delta]) -> list[Delta]:
    """Deltas in which adjacent pieces of the arguments of one call are joined."""
    merged: list[Delta] = []
    for delta in deltas:
        (call,) = delta["tool_calls"]
        last = merged[-1]["tool_calls"][0] if merged else None
        if last and "id" not in last and "id" not in call and last["index"] == call["index"]:
            last["function"]["arguments"] += call["function"]["arguments"]
        else:
            merged.append(delta)
    return merged


def marks_are_special(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a mark of calls or of reasoning is a control token, which decoding leaves out."""
    marks = ["<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", *THINKING, *THINKING.values()]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    is_certain = is_harmony(tokenizer) or getattr(tokenizer, "response_template", None)
    return bool(is_certain) or not special.isdisjoint(marks)
