"""JSON schemas before they are compiled, and runs of digits and spaces in the JSON of replies."""

import json
import re
from dataclasses import replace

import pytest

from linalign import InvalidRequest, SamplingParams
from linalign.alignment_core.decoding.grammars import embedded as compiled
from linalign.alignment_core.decoding.grammars import leniently_embedded
from linalign.alignment_core.decoding.json_runs import MAX_DIGITS, MAX_SPACES, JsonRuns, TokenRuns
from linalign.alignment_core.decoding.schemas import prepared
from linalign.alignment_core.request import Structure
from linalign.server.protocol.generation import StructuredOutputs
from tests.engines import GREEDY, aligned, make_engine, run_all, tiny_pair, token_ids
from tests.oracle import Setting

TEXT = {"type": "string"}


def members(**properties):
    return {"type": "object", "properties": properties}


def closed(**properties):
    return {**members(**properties), "additionalProperties": False}


OF_BOTH = {"allOf": [members(a=TEXT), members(b=TEXT)]}
CLOSED = {
    "an object": (members(a=TEXT), closed(a=TEXT)),
    "an object inside": (members(a=members(b=TEXT)), closed(a=closed(b=TEXT))),
    "alternatives": ({"anyOf": [members(a=TEXT), TEXT]}, {"anyOf": [closed(a=TEXT), TEXT]}),
    "one part": ({"allOf": [members(a=TEXT)]}, {"allOf": [closed(a=TEXT)]}),
    "parts": (OF_BOTH, OF_BOTH),
    "a reference": (
        {"$ref": "#/$defs/X", "title": "x", "$defs": {"X": members(a=TEXT)}},
        {"$ref": "#/$defs/X", "title": "x", "$defs": {"X": closed(a=TEXT)}},
    ),
    "items": ({"type": "array", "items": members(a=TEXT)}, {"type": "array", "items": closed(a=TEXT)}),
}
OPEN = {
    "said so": {**members(a=TEXT), "additionalProperties": True},
    "patterns": {**members(a=TEXT), "patternProperties": {"x": TEXT}},
    "no names": {"type": "object"},
    "another required member": {**members(a=TEXT), "required": ["b"]},
    "alternatives beside": {**members(a=TEXT), "anyOf": [{"required": ["a"]}, members(b=TEXT)]},
    "a reference beside": {"$ref": "#/$defs/X", "properties": {"z": TEXT}, "$defs": {"X": members(a=TEXT)}},
    "a reference in parts": {"allOf": [{"$ref": "#/$defs/X"}, members(b=TEXT)], "$defs": {"X": members(a=TEXT)}},
    "through references": {
        "allOf": [{"$ref": "#/$defs/X"}, members(b=TEXT)],
        "$defs": {"X": {"$ref": "#/$defs/Y"}, "Y": {"anyOf": [members(a=TEXT), TEXT]}},
    },
    "an example": {"type": "object", "examples": [members(a=TEXT)], "const": members(a=TEXT)},
}


@pytest.mark.parametrize("name", CLOSED)
def test_objects_get_no_members_that_nobody_has_named(name):
    schema, expected = CLOSED[name]
    before = json.dumps(schema)
    assert prepared(schema) == expected
    assert json.dumps(schema) == before


@pytest.mark.parametrize("name", OPEN)
def test_objects_stay_open_if_other_schemas_may_name_members(name):
    assert prepared(OPEN[name]) == OPEN[name]


def test_members_may_have_the_names_of_keywords():
    schema = closed(format=TEXT, propertyNames=TEXT, pattern={"type": "integer"}, properties=members(items=TEXT))
    schema["properties"]["properties"]["additionalProperties"] = False
    assert prepared(schema) == schema


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"propertyNames": TEXT}, {}),
        ({"propertyNames": {}}, {}),
        ({"type": "string", "format": "password"}, TEXT),
        ({"type": "integer", "format": "int64"}, {"type": "integer"}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"propertyNames": {"pattern": "a"}}, {"propertyNames": {"pattern": "a"}}),
    ],
    ids=str,
)
def test_annotations_that_restrict_nothing_are_left_out(schema, expected):
    assert prepared(schema) == expected


def chain(length, last):
    """Schemas of which each refers to the next, beside another one."""
    return {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, members(a=TEXT)]} for i in range(length)} | {
        f"d{length}": last
    }


@pytest.mark.parametrize("target", ["#/$defs/d0", "#/$defs/d50", "#"])
def test_references_in_a_circle_end(target):
    schema = {"allOf": [{"$ref": "#/$defs/d0"}, TEXT], "$defs": chain(100, {"$ref": target})}
    assert prepared(schema) == schema


def test_long_chains_of_references_are_refused():
    with pytest.raises(ValueError, match="references"):
        prepared({"allOf": [{"$ref": "#/$defs/d0"}, TEXT], "$defs": chain(600, TEXT)})


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        (members(a={"type": "string", "pattern": "^(?!x)y"}, b={"type": "string", "pattern": "^z$"}), {"b": "^z$"}),
        ({**members(a=TEXT), "minProperties": 5}, {}),
        ({"not": TEXT, **members(a={"type": "array", "uniqueItems": True})}, {}),
        (members(**{f"p{i}": {"type": "string", "pattern": "^(?!x)y"} for i in range(200)}), {}),
    ],
)
def test_what_cannot_be_enforced_is_left_out_for_tools_that_are_not_strict(parameters, kept):
    with pytest.raises(ValueError, match=r"look-around|minProperties|Unimplemented"):
        compiled(parameters)
    schema = leniently_embedded(parameters)
    assert schema["properties"].keys() == parameters["properties"].keys()
    patterns = {name: value["pattern"] for name, value in schema["properties"].items() if "pattern" in value}
    assert patterns == kept


def test_nothing_but_an_object_is_kept_of_a_bomb():
    deep = {"type": "object"}
    for _ in range(150):
        deep = members(a=deep)
    assert leniently_embedded(deep)["type"] == "object"
    assert "properties" not in leniently_embedded(deep)


@pytest.mark.parametrize("spelling", ["$", "\\u0024"])
def test_chains_of_references_do_not_reach_the_library(spelling):
    """llguidance overflows its stack, which ends the process."""
    links = [{"allOf": [{"$ref": f"#/prefixItems/{i + 1}"}]} for i in range(2000)]
    schema = {"type": "object", "properties": {"a": {"$ref": "#/prefixItems/0"}}, "prefixItems": [*links, {}]}
    with pytest.raises(ValueError, match="references"):
        compiled(schema)
    assert "properties" not in leniently_embedded(schema)
    text = json.dumps(schema).replace("$", spelling)
    outputs = StructuredOutputs.model_validate({"json": text})
    with pytest.raises(ValueError, match="references"):
        compiled(json.loads(outputs.structure().text))


# Runs


PIECES = [
    '{"a": ',
    "1",
    "23",
    "456",
    ".",
    "0000",
    '"',
    " ",
    "    ",
    "\\n",
    "\\n\\n  x",
    "x ",
    "}",
    "\\",
    "n",
    "<call>",
    "-",
]
RUNS = TokenRuns(lambda token: PIECES[token].encode(), len(PIECES))


def forbidden_after(text, begin=""):
    """The pieces that are forbidden after these ones."""
    runs = JsonRuns(RUNS, begin)
    for piece in text:
        runs.take(PIECES.index(piece))
    mask = runs.forbidden
    return set() if mask is None else {piece for piece, is_forbidden in zip(PIECES, mask, strict=True) if is_forbidden}


def test_digits_of_numbers_are_bounded():
    assert forbidden_after(['{"a": ', *["456"] * 4]) == set()
    assert forbidden_after(['{"a": ', *["456"] * 5]) == {"23", "456", "0000"}
    assert forbidden_after(['{"a": ', *["456"] * 5, "1"]) == {"1", "23", "456", "0000"}
    assert forbidden_after(['{"a": ', *["456"] * 5, "1", "."]) == set()
    assert forbidden_after(['{"a": ', "1", ".", *["0000"] * 4]) == {"1", "23", "456", "0000"}


def test_white_space_in_strings_is_bounded():
    assert MAX_SPACES == 64
    assert forbidden_after(['{"a": ', '"', *["    "] * 15]) == set()
    assert forbidden_after(['{"a": ', '"', *["    "] * 16]) == {" ", "    ", "\\n", "\\n\\n  x", "\\"}
    assert forbidden_after(['{"a": ', '"', *["\\n"] * 62]) == {"    ", "\\n\\n  x"}
    assert forbidden_after(['{"a": ', '"', *["\\", "n"] * 62]) == {"    ", "\\n\\n  x"}
    assert forbidden_after(['{"a": ', '"', *["    "] * 16, "x "]) == set()
    assert forbidden_after(['{"a": ', '"', *["456"] * 20]) == set()  # digits of a string are not a number
    assert forbidden_after(['{"a": ', '"', *["    "] * 16, '"', "}"]) == set()


def test_only_json_is_bounded():
    assert forbidden_after(["456"] * 20, begin="<call>") == set()
    assert forbidden_after(["456", '"', "<call>", '{"a": ', *["456"] * 6], begin="<call>") >= {"1", "456"}
    assert forbidden_after(["<call>", '{"a": ', "1", "}", *["456"] * 6], begin="<call>") == set()
    assert forbidden_after(["<call>", '{"a": ', "1", "}", '{"a": ', *["456"] * 6], begin="<call>") >= {"1", "456"}


NUMBER = Structure("json_schema", json.dumps({**closed(a={"type": "number"}), "required": ["a"]}))


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
def test_numbers_of_replies_end(tokenizer, static):
    """Without the bounds, digits that a bias prefers would go on until max_tokens. The oracle judges the reply."""
    loaded, oracle = tiny_pair(tokenizer)
    engine = make_engine(loaded, num_pages=200, static=static)
    digits = dict.fromkeys(tokenizer.convert_tokens_to_ids(list("3456789")), 50.0)
    params = replace(GREEDY, structure=NUMBER, ignore_eos=False, max_tokens=60, logit_bias=digits)
    prompt = aligned(2.0)
    (outputs,) = run_all(engine, [(prompt, params)])
    text = "".join(output.text for output in outputs)
    assert outputs[-1].finish_reason == "stop"
    assert re.fullmatch(rf'{{"a": -?\d{{{MAX_DIGITS}}}(\.\d{{{MAX_DIGITS}}})?([eE][+-]?\d+)?}}', text), text

    def allowed(output):
        matcher = engine.grammars.matcher(NUMBER)
        assert all(matcher.consume_token(token) for token in output)
        return matcher.allowed(engine.vocab_size).nonzero()[0].tolist()

    ids = token_ids(outputs)
    oracle.check_greedy(
        prompt, Setting(prompt.ratios, prompt.weights, allowed=allowed, bias=tuple(digits.items())), ids
    )


def test_a_constant_with_many_digits_is_written(embedded):
    engine = make_engine(embedded, num_pages=200)
    long = 2**60
    params = SamplingParams(
        temperature=0, max_tokens=60, structure=Structure("json_schema", json.dumps({"const": long}))
    )
    (outputs,) = run_all(engine, [(aligned(2.0), params)])
    assert json.loads("".join(output.text for output in outputs)) == long


def test_errors_are_in_the_words_of_the_schema(embedded):
    grammars = make_engine(embedded, num_pages=8).grammars
    for schema, words in (({"not": TEXT}, "not"), ({"type": "string", "pattern": "(?=x)y"}, "look-ahead")):
        with pytest.raises(InvalidRequest, match=words) as error:
            grammars.matcher(Structure("json_schema", json.dumps(schema), after='"</think>"'))
        assert "lark" not in str(error.value)
        assert "@body" not in str(error.value)
