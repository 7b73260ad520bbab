"""OpenAI's harmony format, in which gpt-oss models reply: messages of the form `header <|message|> body`.

    <|channel|>analysis<|message|>THOUGHTS<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{"argument": 1}<|call|>

The template writes the first `<|start|>assistant` itself. The package openai-harmony has a parser too, but for token
ids of a vocabulary that it downloads.
"""

import math
import re
from typing import TYPE_CHECKING

from linalign.server.deltas import Delta, arguments_delta, call_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE = "assistant"
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
BODY = "<|message|>"  # the mark in front of every body
END = f"<|end|><|start|>{ROLE}"  # of a message that another one follows
MAX_HEADER = 256  # characters; the rest of a longer header is dropped
MARKS = tuple(f"<|{name}|>" for name in ("start", "channel", "constrain", "message", "end", "return", "call"))
MARK = re.compile("|".join(map(re.escape, MARKS)))
MIN_MARK = 5  # characters that tell the beginning of a mark from other text
CALLED = re.compile(r" to=functions\.([^\s<]+)")


def is_harmony(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's chat template writes this format, and the tokenizer has no response template."""
    template = str(tokenizer.chat_template)
    return FINAL in template and not getattr(tokenizer, "response_template", None)


class HarmonyParser:
    """Parses the text of one reply to the deltas of its message. Replies without any mark are content.

    generation_prompt: The part of the reply that the template has already written; "" if the reply continues an answer.
    has_tools: Whether the model may call tools. max_calls: Further calls are dropped.
    """

    def __init__(self, generation_prompt: str, has_tools: bool, max_calls: float = math.inf) -> None:
        self._has_tools, self._max_calls, self._num_calls = has_tools, max_calls, 0
        self._pending = ""  # text that may be the beginning of a mark
        self._header: str | None = None  # of the message, without `<|start|>`; None in its body
        self._field: str | None = "content"  # that the body belongs to; None if the body is dropped
        self._name: str | None = None  # of the function of a call that has no arguments yet
        self._has_text: set[str] = set()  # fields with text
        self._is_new = False  # whether a body has begun and has no text yet
        begin = generation_prompt.rfind("<|start|>")
        if begin >= 0:
            self.feed(generation_prompt[begin:])

    def feed(self, text: str) -> list[Delta]:
        """Parse a part of the text."""
        text, deltas, place = self._pending + text, list[Delta](), 0
        for mark in MARK.finditer(text):
            deltas += self._take(text[place : mark.start()])
            deltas += self._take_mark(mark[0])
            place = mark.end()
        end = len(text) - _size_of_begun_mark(text[place:])
        self._pending = text[end:]
        return deltas + self._take(text[place:end])

    def finish(self) -> list[Delta]:
        """The end of the message. A mark, a header or a call that has only begun is left out."""
        return [] if len(self._pending) >= MIN_MARK else self._take(self._pending)

    def _take(self, text: str) -> list[Delta]:
        """A text without marks."""
        if self._header is not None:
            header = self._header + text
            if not _is_plain_text(header):
                self._header = header[:MAX_HEADER]
                return []
            text, self._header, self._field = header.removeprefix(ROLE), None, "content"
        if not text or self._field is None:
            return []
        if self._field == "tool_calls":
            return [*self._start_call(), arguments_delta(self._num_calls - 1, text)]
        separator = "\n" if self._is_new and self._field in self._has_text else ""
        self._is_new = False
        self._has_text.add(self._field)
        return [{self._field: separator + text}]

    def _start_call(self) -> list[Delta]:
        """The beginning of a call, at its first arguments."""
        name, self._name = self._name, None
        return [] if name is None else [call_start(self._num_calls - 1, name)]

    def _take_mark(self, mark: str) -> list[Delta]:
        if self._header is not None and mark == "<|message|>":
            header, self._header = self._header, None
            self._begin_body(header)
            return []
        if self._header is not None and mark in ("<|channel|>", "<|constrain|>"):
            self._header = (self._header + mark)[:MAX_HEADER]
            return []
        if mark in ("<|message|>", "<|constrain|>"):  # they have no meaning in a body
            return []
        if mark in ("<|start|>", "<|channel|>"):
            self._header = mark.removeprefix("<|start|>")
        return self._end_body()

    def _begin_body(self, header: str) -> None:
        self._is_new = True
        role, called = re.split(r"<|\s", header)[0], CALLED.search(header) if self._has_tools else None
        if called is None:
            # A call of a tool that the request does not have is a thought: these models know some tools themselves.
            is_thought = "<|channel|>analysis" in header or " to=" in header
            self._field = None if role not in ("", ROLE) else "reasoning_content" if is_thought else "content"
            return
        self._num_calls += 1
        self._name = called[1]
        self._field = "tool_calls" if self._num_calls <= self._max_calls else None

    def _end_body(self) -> list[Delta]:
        field, self._field = self._field, "content"
        if field == "tool_calls" and self._name is not None:
            return [*self._start_call(), arguments_delta(self._num_calls - 1, "{}")]
        return []


def _is_plain_text(header: str) -> bool:
    """Whether this beginning of a header is no header: the model writes a text behind its role."""
    callee = (" " + header.removeprefix(ROLE).lstrip())[: len(" to=")]
    return header.startswith(ROLE) and not " to=".startswith(callee) and not MARK.search(header)


def _size_of_begun_mark(text: str) -> int:
    """Characters of the beginning of a mark at the end of a text."""
    sizes = range(max(map(len, MARKS)) - 1, 0, -1)
    return next((size for size in sizes if any(mark[:size] == text[-size:] for mark in MARKS)), 0)
