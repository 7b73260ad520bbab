"""Tool calls and reasoning in replies, recognised however the text is cut into pieces."""

import json
import statistics
import time
from types import SimpleNamespace

import pytest

from linalign.server.deltas import message_of
from linalign.server.tool_calls import HERMES, LLAMA, MISTRAL, ReplyParser, call_format

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Oslo"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "flights")
]
TEMPLATES = {
    "qwen": "<tool_call> <think> {{ tools }}",
    "llama": "<|python_tag|> {{ tools }}",
    "mistral": "[TOOL_CALLS] {{ tools }}",
    "none": "{{ messages }}",
}


def tokenizer_of(family, **more):
    return SimpleNamespace(chat_template=TEMPLATES[family], added_tokens_decoder={}, **more)


REPLIES = [
    ("qwen", "", "Just text, with <b>marks</b>.", {"content": "Just text, with <b>marks</b>."}, []),
    ("qwen", "", "  led by spaces", {"content": "  led by spaces"}, []),
    ("qwen", "", "<think>\nHm.\n</think>\n\nYes.", {"content": "Yes.", "reasoning_content": "Hm.\n"}, []),
    (
        "qwen",
        "<|im_start|>assistant\n<think>\n",
        "Hm.\n</think>\n\nYes.",
        {"content": "Yes.", "reasoning_content": "Hm.\n"},
        [],
    ),
    (
        "qwen",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Yes.",
        {"content": "Yes."},
        [],
    ),
    (
        "qwen",
        "",
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "n": [1, {"a": "}\\""}]}}\n'
        "</tool_call>\n"
        '<tool_call>{"name": "flights", "arguments": {}}</tool_call>',
        {"content": "Let me see.\n"},
        [("weather", {"city": "Rome", "n": [1, {"a": '}"'}]}), ("flights", {})],
    ),
    (
        "qwen",
        "",
        '<tool_call>{"arguments": {"name": "not this", "arguments": 1}, "name": "weather"}</tool_call>',
        {},
        [("weather", {"name": "not this", "arguments": 1})],
    ),
    ("qwen", "", '<tool_call>{"name": "weather"}</tool_call>', {}, [("weather", {})]),
    (
        "qwen",
        "",
        '<tool_call>{"name": "weather", "arguments": "{\\"a\\": 1}"}</tool_call>',
        {},
        [("weather", {"a": 1})],
    ),
    ("qwen", "", "<tool_call>nothing of it</tool_call>", {"content": "<tool_call>nothing of it</tool_call>"}, []),
    ("qwen", "", "a < b <tool", {"content": "a < b "}, []),  # the beginning of a mark
    ("qwen", "", "a < b <t", {"content": "a < b <t"}, []),
    ("qwen", "", "Write <tool_call> and then JSON.", {"content": "Write <tool_call> and then JSON."}, []),
    ("llama", "", '{"name": "Bob", "life": "He w', {"content": '{"name": "Bob", "life": "He w'}, []),
    ("qwen", "", 'So. <tool_call>\n{"name": "wea', {"content": "So. "}, []),
    ("mistral", "", "So. [TOOL_CAL", {"content": "So. "}, []),
    ("mistral", "", '[TOOL_CALLS][{"na', {}, []),
    ("llama", "", '{"name": "wea', {}, []),
    ("llama", "", '{"x": "weather"', {"content": '{"x": "weather"'}, []),
    ("llama", "", '{"name": "Bob", "age": 3}', {"content": '{"name": "Bob", "age": 3}'}, []),  # not a function
    ("llama", "", '{"name": "weather", "parameters": {"city": "Oslo"}}', {}, [("weather", {"city": "Oslo"})]),
    ("llama", "", '<|python_tag|>{"type": "function", "name": "weather", "parameters": {}}', {}, [("weather", {})]),
    (
        "llama",
        "",
        '{"name": "weather", "parameters": {}}; {"name": "flights", "parameters": {"x": 1}}',
        {},
        [("weather", {}), ("flights", {"x": 1})],
    ),
    ("llama", "", "In JSON: {1}", {"content": "In JSON: {1}"}, []),
    (
        "mistral",
        "",
        '[TOOL_CALLS][{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {"y": [2]}}]',
        {},
        [("a", {"x": 1}), ("b", {"y": [2]})],
    ),
]


@pytest.mark.parametrize(
    ("family", "generation_prompt", "text", "fields", "calls"), REPLIES, ids=[f"{r[0]}-{r[2][:40]}" for r in REPLIES]
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_marks_are_found_for_any_chunking(family, generation_prompt, text, fields, calls, size):
    parser = ReplyParser(tokenizer_of(family), generation_prompt, TOOLS)
    deltas = [delta for i in range(0, len(text), size) for delta in parser.feed(text[i : i + size])]
    message = message_of(deltas + parser.finish())
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.pop("tool_calls", [])]
    assert found == calls
    assert {name: text for name, text in message.items() if name != "role" and text} == fields
    ids = [call["id"] for delta in deltas for call in delta.get("tool_calls", ()) if "id" in call]
    assert len(set(ids)) == len(calls)


def test_arguments_are_streamed_as_they_are_written():
    parser = ReplyParser(tokenizer_of("qwen"), "", TOOLS)
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    deltas = [delta for character in text for delta in parser.feed(character)]
    seen = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas]
    assert "".join(seen) == '{"city": "Rome"}'
    assert len(seen) > 10


def test_without_tools_there_are_no_calls():
    text = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    parser = ReplyParser(tokenizer_of("qwen"), "", [])
    assert message_of(parser.feed(text) + parser.finish()) == {"role": "assistant", "content": text}


def test_the_tokenizers_response_template_has_priority():
    own = {
        "start_anchor_pattern": "^",
        "fields": {
            "content": {"content": "text"},
            "thinking": {"open": "<r>", "close": "</r>"},
            "tool_calls": {
                "open_pattern": r"<call:(?P<name>\w+)>",
                "close": "</call>",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
        },
    }
    parser = ReplyParser(tokenizer_of("qwen", response_template=own), "", TOOLS)
    message = message_of(parser.feed('<r>Hm</r>Yes<call:weather>{"days": 3}</call>') + parser.finish())
    assert message["reasoning_content"] == "Hm"
    assert message["content"] == "Yes"
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"days": 3}'}


def test_the_template_decides_the_call_format():
    assert [call_format(tokenizer_of(family)) for family in TEMPLATES] == [HERMES, LLAMA, MISTRAL, HERMES]


CALL = '{{"name": "weather", "{}": {{"city": "{}", "days": 3}}}}'
FREE = {
    "qwen": ["Hello <b>", "", f"Well.\n<tool_call>\n{CALL.format('arguments', 'Rome')}\n</tool_call>\nSo."],
    "llama": ["Hello {", "", CALL.format("parameters", "Rome")],
    "mistral": ["Hello [", "", f"[TOOL_CALLS][{CALL.format('arguments', 'Rome')}]"],
}


@pytest.mark.parametrize("family", FREE)
def test_later_calls_are_dropped_without_parallel_calls(family):
    text = {
        "qwen": '<tool_call>{"name": "weather", "arguments": {"l": [1]}}</tool_call><tool_call>{"name": "b"}',
        "llama": '{"name": "weather", "parameters": {"l": [1]}}; {"name": "flights", "parameters": {}}',
        "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"l": [1]}}, {"name": "b", "arguments": {}}]',
    }[family]
    parser = ReplyParser(tokenizer_of(family), "", TOOLS, 1)
    deltas = [delta for character in text for delta in parser.feed(character)] + parser.finish()
    (call,) = message_of(deltas)["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"l": [1]})


BEGUN_CALL = '<tool_call>{"name": "weather", "arguments": '
ADVERSARIES = {
    "white space": " ",
    "line ends": "\n",
    "beginnings of marks": "</tool_cal<too<|python_ta[TOOL_CALL",
    "marks": "<tool_call>[TOOL_CALLS]<think>[THINK]",
    "marks and their ends": "<tool_call></tool_call><think></think>[THINK][/THINK]",
    "braces": ("<tool_call>", "{"),
    "a long string": (BEGUN_CALL + '{"city": "', "x"),
    "backslashes": (BEGUN_CALL + '{"city": "', "\\"),
    "space before arguments": (BEGUN_CALL, " "),
    "arguments as a string": (BEGUN_CALL + '"', "\\n"),
    "arguments before the name": ('<tool_call>{"arguments": {"city": "', "x"),
    "calls": BEGUN_CALL + "{}}</tool_call>",
    "half a call": '[TOOL_CALLS][{"name": ',
}


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("name", ADVERSARIES)
def test_the_time_of_a_reply_is_linear(family, name):
    """Compares a text with a longer one. A client that demands a structure chooses what the parser must read."""
    adversary = ADVERSARIES[name]
    head, piece = adversary if isinstance(adversary, tuple) else ("", adversary)

    def seconds(num):
        text = head + (piece * num)[:num]
        parser = ReplyParser(tokenizer_of(family), "", TOOLS)
        began = time.process_time()
        for start in range(0, len(text), 6):  # like tokens of six characters
            parser.feed(text[start : start + 6])
        parser.finish()
        return time.process_time() - began

    shortest = 1500
    short, longer = (statistics.median(seconds(num) for _ in range(3)) for num in (shortest, 4 * shortest))
    assert longer < 9 * short  # 4 is linear, 16 is not
    assert seconds(16 * shortest) < 40 * short


OWN = {
    "start_anchor_pattern": "^",
    "fields": {
        "content": {"content": "text"},
        "tool_calls": {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True},
    },
}
DEEP = "[" * 3000
HOSTILE = [
    '<tool_call>{"name": "weather", "arguments": "\\ud800"}</tool_call>',
    '<tool_call>{"name": "\\udfff", "arguments": {"a": "\\ud83d\\ude00"}}</tool_call>',
    f'<tool_call>{{"name": {DEEP}, "arguments": {{}}}}</tool_call> and so on',
    f"<tool_call>{DEEP}</tool_call> and so on",
    f'<tool_call>{{"name": "w", "arguments": {{"a": {"1" * 5000}}}}}</tool_call>',
    "<tool_call>not json</tool_call> and <tool_call>so on",
    '<tool_call>[1, null, "x", {"function": 3}, {"name": "w"}]</tool_call>',
    "<tool_call></tool_call>" * 3 + "<think>a</think>b",
    "\0<tool_call>\0{\0",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("more", [{}, {"response_template": OWN}], ids=["ours", "its own"])
def test_hostile_calls_are_text_or_calls_for_any_chunking(text, more):
    messages = []
    for size in (1, 7, len(text)):
        parser = ReplyParser(tokenizer_of("qwen", **more), "", TOOLS)
        deltas = [d for start in range(0, len(text), size) for d in parser.feed(text[start : start + size])]
        message = message_of([*deltas, *parser.finish()])
        json.dumps(message, ensure_ascii=False).encode()  # no halves of surrogate pairs
        for call in message.get("tool_calls", ()):
            call["id"] = ""
        messages.append(message)
    assert messages[0] == messages[1] == messages[2]
    if "and so on" in text:
        assert messages[0]["content"].endswith("so on")


@pytest.mark.parametrize("piece", ["<tool_call></tool_call>", "<think>a</think>b"])
def test_the_time_of_a_whole_reply_is_linear_in_its_marks(piece):
    def seconds(num):
        parser, began = ReplyParser(tokenizer_of("qwen"), "", TOOLS), time.process_time()
        parser.feed(piece * num)
        return time.process_time() - began

    short, long = (statistics.median(seconds(num) for _ in range(3)) for num in (2000, 8000))
    assert long < 8 * short  # 4 is linear, 16 is not
