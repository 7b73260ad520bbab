"""Grammars of replies with tool calls: calls, formats and reasoning together."""

import json
from dataclasses import replace

import pytest

from linalign import InvalidRequest, SamplingParams
from linalign.alignment_core.decoding.grammars import Grammars
from linalign.alignment_core.request import Structure
from linalign.server.deltas import message_of
from linalign.server.tool_calls import ReplyParser
from linalign.server.tool_grammars import calls_or, required_calls, strict_calls
from tests.engines import aligned, make_engine, run_all, tiny_pair
from tests.server.test_tool_calls import FREE, TOOLS, tokenizer_of


@pytest.fixture(scope="module")
def grammars(embedded):
    return Grammars(embedded.tokenizer, embedded.model.config.vocab_size, embedded.eos_token_ids)


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
