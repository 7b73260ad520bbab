"""Tool calls and reasoning in replies, recognised however the text is cut into pieces."""

import json
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from linalign import InvalidRequest, SamplingParams
from linalign.alignment_core.decoding.grammars import Grammars
from linalign.alignment_core.request import Structure
from linalign.server.deltas import message_of
from linalign.server.tool_calls import HERMES, LLAMA, MISTRAL, ReplyParser, call_format
from linalign.server.tool_grammars import calls_or, required_calls, strict_calls
from tests.engines import aligned, make_engine, run_all, tiny_pair

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


@pytest.fixture(scope="module")
def grammars(embedded):
    return Grammars(embedded.tokenizer, embedded.model.config.vocab_size, embedded.eos_token_ids)


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


@pytest.fixture(scope="module")
def wide(tokenizer):
    return tiny_pair(tokenizer)[0]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("family", ["qwen", "llama", "mistral", "none"])
def test_a_required_call_follows_its_schema(wide, family, parallel):
    """A random model must call a function in the form of its family, and its reply must parse."""
    engine = make_engine(wide, num_pages=400)
    structure = required_calls(tokenizer_of(family), TOOLS, parallel)
    params = [SamplingParams(structure=structure, max_tokens=120, seed=i, temperature=1.0) for i in range(4)]
    seen = set()
    for outputs in run_all(engine, [(aligned(2.0, 20, i), p) for i, p in enumerate(params)]):
        if outputs[-1].finish_reason == "length":
            assert parallel  # it may add calls without end
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


CALL = '{{"name": "weather", "{}": {{"city": "{}", "days": 3}}}}'
FREE = {
    "qwen": ["Hello <b>", "", f"Well.\n<tool_call>\n{CALL.format('arguments', 'Rome')}\n</tool_call>\nSo."],
    "llama": ["Hello {", "", CALL.format("parameters", "Rome")],
    "mistral": ["Hello [", "", f"[TOOL_CALLS][{CALL.format('arguments', 'Rome')}]"],
}


def accepts(grammars, tokenizer, structure, text):
    matcher, ids = grammars.matcher(structure), tokenizer.encode(text, add_special_tokens=False)
    return all(matcher.consume_token(id) for id in ids) and matcher.is_accepting()


@pytest.mark.parametrize("family", FREE)
def test_calls_of_strict_tools_keep_to_their_schemas(family, grammars, tokenizer):
    tools = [
        {**tool, "function": {**tool["function"], "strict": name}}
        for tool, name in zip(TOOLS, (True, False), strict=True)
    ]
    structure = strict_calls(tokenizer_of(family), tools, True)
    *texts, call = FREE[family]
    for text in (*texts, call, call.replace("weather", "flights").replace("Rome", "Paris")):
        assert accepts(grammars, tokenizer, structure, text), text
    for text in (call.replace("Rome", "Paris"), call.replace("weather", "rain")):
        assert not accepts(grammars, tokenizer, structure, text), text
    alone = strict_calls(tokenizer_of(family), tools, False)
    assert accepts(grammars, tokenizer, alone, call)
    second = {"qwen": f"\n{call}", "llama": f"; {call}", "mistral": call.removeprefix("[TOOL_CALLS][")}[family]
    both = f"{call[:-1]}, {second}" if family == "mistral" else call + second
    assert accepts(grammars, tokenizer, structure, both), both
    assert accepts(grammars, tokenizer, alone, both) == (family == "qwen")  # whose parser drops the second call


ANSWER = {"type": "object", "properties": {"name": {"$ref": "#/$defs/word"}}, "required": ["name"]}
ANSWER |= {"$defs": {"word": {"type": "string"}}}


@pytest.mark.parametrize("family", FREE)
def test_a_format_beside_tools_allows_calls_and_the_format_alone(family, grammars, tokenizer):
    *_, call = FREE[family]
    call = call.removeprefix("Well.\n").removesuffix("\nSo.")
    formats = [
        (Structure("json_schema", json.dumps(ANSWER), "response_format"), '{"name": "weather"}'),
        (Structure("regex", "[a-c]+", "structured_outputs"), "abc"),
        (Structure("choice", '["yes", "no"]', "structured_outputs"), "yes"),
        (Structure("grammar", 'start: "x" "y"', "structured_outputs"), "xy"),
    ]
    for format, text in formats:
        structure = calls_or(format, tokenizer_of(family), TOOLS, False)
        for allowed in (text, call):
            assert accepts(grammars, tokenizer, structure, allowed), (format, allowed)
        for refused in ("Hello", "", call.replace("Rome", "Paris"), call.replace("weather", "rain"), f"{text}{call}"):
            assert not accepts(grammars, tokenizer, structure, refused), (format, refused)


@pytest.mark.parametrize("family", FREE)
def test_references_in_tools_beside_a_format_still_hold(family, grammars, tokenizer):
    """In Llama's format the schemas of the tools become parts of another schema."""
    parts = {"A": {"properties": {"city": {"enum": ["Rome"]}}}, "B": {"properties": {"days": {"enum": [3]}}}}
    parameters = {"allOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": parts}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    call = FREE[family][2].removeprefix("Well.\n").removesuffix("\nSo.")
    format = Structure("json_schema", json.dumps(ANSWER), "response_format")
    structure = calls_or(format, tokenizer_of(family), [tool], False)
    assert accepts(grammars, tokenizer, structure, call)
    assert not accepts(grammars, tokenizer, structure, call.replace("Rome", "Oslo"))


@pytest.mark.parametrize("enumerated", [False, True], ids=["long texts", "long enumerations"])
def test_tools_that_are_too_large_together_are_not_refused(grammars, enumerated):
    """A set of tools whose schemas are too large together: only the tools that are strict keep theirs."""
    words = [f"word{i}" for i in range(2000)] if enumerated else [{"x": "y" * 200}]
    properties = {f"p{i}": {"enum": words} for i in range(3 if enumerated else 20)}
    parameters = {"type": "object", "properties": properties}
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": parameters, "strict": False}}
        for i in range(60)
    ]
    structure = required_calls(tokenizer_of("qwen"), tools, False)
    assert "word7" not in structure.text
    assert not grammars.matcher(structure).is_error()
    few = required_calls(tokenizer_of("qwen"), tools[:1], False)
    assert ("word7" in few.text) == enumerated


def test_an_unknown_call_format_is_refused_for_schemas():
    own = tokenizer_of("none", response_template={"fields": {}})
    for make in (required_calls, strict_calls):
        with pytest.raises(InvalidRequest, match="calls of this model"):
            make(own, TOOLS, True)


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


def test_a_structure_begins_where_the_reasoning_ends(grammars, tokenizer):
    after, before = json.dumps("</think>"), json.dumps("<think>")
    structures = [
        (Structure("json_schema", '{"type": "integer"}', after=after), "7"),
        (Structure("regex", "a+b", after=after), "aab"),
        (Structure("choice", '["yes", "n.o"]', after=after), "n.o"),
        (Structure("grammar", 'start: "x" "y"', after=after), "xy"),
        (
            replace(required_calls(tokenizer_of("qwen"), TOOLS, False), after=after),
            FREE["qwen"][2].removeprefix("Well.\n").removesuffix("\nSo."),
        ),
    ]
    for structure, text in structures:
        assert accepts(grammars, tokenizer, structure, f"Hm {{1}}\n</think>\n\n{text}"), structure
        assert not accepts(grammars, tokenizer, structure, text)
        assert not accepts(grammars, tokenizer, structure, f"Hm\n</think>\n\n{text}!")
        optional = replace(structure, before=before)  # the model itself begins the reasoning, or leaves it out
        for thoughts in ("", "<think>\nHm {1}\n</think>\n\n", "<think></think>"):
            assert accepts(grammars, tokenizer, optional, thoughts + text), structure
            assert not accepts(grammars, tokenizer, optional, f"{thoughts}{text}!")
        assert not accepts(grammars, tokenizer, optional, f"Hm</think>{text}")


CALL = '<tool_call>{"name": "weather", "arguments": '
ADVERSARIES = {
    "white space": " ",
    "line ends": "\n",
    "beginnings of marks": "</tool_cal<too<|python_ta[TOOL_CALL",
    "marks": "<tool_call>[TOOL_CALLS]<think>[THINK]",
    "marks and their ends": "<tool_call></tool_call><think></think>[THINK][/THINK]",
    "braces": ("<tool_call>", "{"),
    "a long string": (CALL + '{"city": "', "x"),
    "backslashes": (CALL + '{"city": "', "\\"),
    "space before arguments": (CALL, " "),
    "arguments as a string": (CALL + '"', "\\n"),
    "arguments before the name": ('<tool_call>{"arguments": {"city": "', "x"),
    "calls": CALL + "{}}</tool_call>",
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
