"""Marks in replies, found however the text is cut."""

import json
from types import SimpleNamespace

import pytest

from alignment_core import SamplingParams
from server.tool_calls import HERMES, LLAMA, MISTRAL, ReplyParser, call_format, demanded, message_of
from tests.alignment_core.test_engine import aligned
from tests.conftest import make_engine, run_all, tiny_pair

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
    ("qwen", "", "a < b <tool", {"content": "a < b <tool"}, []),
    ("llama", "", '{"name": "weather", "parameters": {"city": "Oslo"}}', {}, [("weather", {"city": "Oslo"})]),
    ("llama", "", '<|python_tag|>{"type": "function", "name": "weather", "parameters": {}}', {}, [("weather", {})]),
    (
        "llama",
        "",
        '{"name": "a", "parameters": {}}; {"name": "b", "parameters": {"x": 1}}',
        {},
        [("a", {}), ("b", {"x": 1})],
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
    ("family", "begun", "text", "fields", "calls"), REPLIES, ids=[f"{r[0]}-{r[2][:40]}" for r in REPLIES]
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_marks_are_found_however_the_text_is_cut(family, begun, text, fields, calls, size):
    parser = ReplyParser(tokenizer_of(family), begun, TOOLS)
    deltas = [delta for i in range(0, len(text), size) for delta in parser.feed(text[i : i + size])]
    message = message_of(deltas + parser.finish())
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.pop("tool_calls", [])]
    assert found == calls
    assert {name: text for name, text in message.items() if name != "role" and text} == fields
    ids = [call["id"] for delta in deltas for call in delta.get("tool_calls", ()) if "id" in call]
    assert len(set(ids)) == len(calls)


def test_arguments_come_as_they_are_written():
    parser = ReplyParser(tokenizer_of("qwen"), "", TOOLS)
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
    deltas = [delta for character in text for delta in parser.feed(character)]
    seen = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas]
    assert "".join(seen) == '{"city": "Rome"}'
    assert len(seen) > 10


def test_without_tools_nothing_is_a_call():
    text = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    parser = ReplyParser(tokenizer_of("qwen"), "", [])
    assert message_of(parser.feed(text) + parser.finish()) == {"role": "assistant", "content": text}


def test_the_tokenizers_own_template_goes_first():
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


def test_formats_are_told_by_the_template():
    assert [call_format(tokenizer_of(family)) for family in TEMPLATES] == [HERMES, LLAMA, MISTRAL, HERMES]


@pytest.fixture(scope="module")
def wide(tokenizer):
    return tiny_pair(tokenizer)[0]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("family", ["qwen", "llama", "mistral", "none"])
def test_a_demanded_call_keeps_to_its_schema(wide, family, parallel):
    """A random model calls what it has to, in the family's own form, and its reply parses back."""
    engine = make_engine(wide, num_pages=400)
    structure = demanded(tokenizer_of(family), TOOLS, parallel)
    params = [SamplingParams(structure=structure, max_tokens=120, seed=i, temperature=1.0) for i in range(4)]
    seen = set()
    for outputs in run_all(engine, [(aligned(2.0, 20, i), p) for i, p in enumerate(params)]):
        if outputs[-1].finish_reason == "length":
            assert parallel  # it may go on for ever
            continue
        parser = ReplyParser(tokenizer_of(family), "", TOOLS)
        message = message_of(parser.feed("".join(output.text for output in outputs)) + parser.finish())
        assert message["content"] is None
        for call in message["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            assert arguments["city"] in ("Rome", "Oslo")
            assert 1 <= arguments["days"] <= 9
            assert set(arguments) == {"city", "days"}
            seen.add(call["function"]["name"])
        assert len(message["tool_calls"]) == 1 or parallel
    assert seen <= {"weather", "flights"}
    assert seen
