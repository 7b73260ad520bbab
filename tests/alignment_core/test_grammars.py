"""Structured output: every reply matches its structure, and is the best reply that matches."""

import json
import os
import random
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from linalign import InvalidRequest, SamplingParams
from linalign.alignment_core.request import Structure
from tests.engines import GREEDY, aligned, make_engine, run_all, tiny_pair, token_ids
from tests.oracle import Setting

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wide(tokenizer):
    """A random model with the whole vocabulary of a real tokenizer."""
    return tiny_pair(tokenizer)


def allowed_by(engine, structure):
    def allowed(output):
        matcher = engine.grammars.matcher(structure)
        assert all(matcher.consume_token(token) for token in output)
        return matcher.allowed(engine.vocab_size).nonzero()[0].tolist()

    return allowed


STRUCTURES = [
    Structure("choice", '["yes", "no", "perhaps not"]'),
    Structure("regex", "[a-c]{3,6} [0-9]+z"),
    Structure("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
    Structure("grammar", 'root ::= "a" ("b" | "c")+ "!"'),
]


@pytest.mark.parametrize("static", [False, True])
def test_replies_are_the_most_likely_allowed_tokens(wide, static):
    """Greedy requests, aligned and plain, in one crowd with a request without a structure. The oracle judges them."""
    loaded, oracle = wide
    engine = make_engine(loaded, num_pages=800, static=static)
    requests = [
        (aligned(ratio, 20, i), replace(GREEDY, structure=structure, ignore_eos=False))
        for i, structure in enumerate(STRUCTURES)
        for ratio in (0, 2.0)
    ]
    replies = run_all(engine, [*requests, (aligned(2.0), GREEDY)])
    for (prompt, params), outputs in zip(requests, replies, strict=False):
        setting = Setting(prompt.ratios, prompt.weights, allowed=allowed_by(engine, params.structure))
        ids = token_ids(outputs)
        if ids[-1] in engine.eos_token_ids:
            assert outputs[-1].finish_reason == "stop"
        assert oracle.check_greedy(prompt, setting, ids) <= 1
    choices = ["".join(o.text for o in outputs) for outputs in replies[:2]]
    assert set(choices) <= {"yes", "no", "perhaps not"}
    assert [outputs[-1].finish_reason for outputs in replies[:2]] == ["stop", "stop"]


def test_a_structure_ends_where_nothing_can_follow(wide):
    engine = make_engine(wide[0], num_pages=400)
    for minimum in (0, 50):  # min_tokens beyond the structure's length does not prolong the reply
        params = SamplingParams(structure=Structure("choice", '["Lisbon"]'), max_tokens=60, seed=1, min_tokens=minimum)
        (outputs,) = run_all(engine, [(aligned(2.0), params)])
        assert "".join(o.text for o in outputs) == "Lisbon"
        assert outputs[-1].finish_reason == "stop"


def schemas():
    """100 different random schemas, up to three levels deep."""
    rng = random.Random(0)

    def leaf():
        low = rng.randint(-5, 5)
        return rng.choice(
            [
                {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 9)},
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": rng.randint(1, 3)},
                {"enum": rng.sample(["red", "green", 3, None, True, "blue"], 3)},
                {"const": rng.choice(["x", 1, None])},
                {"type": "string", "pattern": f"^[a-f]{{1,{rng.randint(1, 4)}}}$"},
                {"type": "string", "minLength": 1, "maxLength": rng.randint(1, 6)},
                {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])},
                {"type": ["boolean", "null"]},
                {"type": "integer", "multipleOf": rng.randint(2, 5), "minimum": 0, "maximum": 99},
            ]
        )

    def schema(depth):
        kind = rng.choice(["object", "array", "anyOf", "leaf"] if depth else ["leaf"])
        if kind == "object":
            names = [f"{rng.choice('pqrst')}{i}" for i in range(rng.randint(1, 3))]
            required = [name for name in names if rng.random() < 0.7]
            properties = {name: schema(depth - 1) for name in names}
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        if kind == "array":
            low = rng.randint(0, 2)
            return {"type": "array", "items": schema(depth - 1), "minItems": low, "maxItems": low + 1}
        if kind == "anyOf":
            return {"anyOf": [schema(depth - 1) for _ in range(2)]}
        return leaf()

    result = [
        {
            "$defs": {
                "tree": {
                    "type": "object",
                    "properties": {
                        "value": leaf(),
                        "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": i},
                    },
                    "required": ["value"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/tree",
        }
        for i in range(3)
    ]
    while len(result) < 100:
        new = schema(3)
        if new not in result:
            result.append(new)
    return result


@pytest.mark.parametrize("ratio", [0, 2.0])
def test_replies_follow_a_hundred_schemas(wide, ratio):
    engine = make_engine(wide[0], num_pages=4000, max_num_seqs=50)
    requests = [
        (
            aligned(ratio, 20, i),
            SamplingParams(
                structure=Structure("json_schema", json.dumps(schema)), max_tokens=400, seed=i, temperature=1.0
            ),
        )
        for i, schema in enumerate(schemas())
    ]
    replies = run_all(engine, requests)
    finished = 0
    for schema, outputs in zip(schemas(), replies, strict=True):
        if outputs[-1].finish_reason == "stop":
            jsonschema.validate(json.loads("".join(o.text for o in outputs)), schema)
            finished += 1
    assert finished >= 95  # a random model may not finish a deep tree within max_tokens


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure("json_schema", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Structure("json_schema", '{"not": {"type": "string"}}'), "not"),
        (Structure("json_schema", '{"if": {"type": "string"}, "then": {"minLength": 3}}'), "if"),
        (Structure("json_schema", '{"type": "string", "format": "idn-hostname"}'), "idn-hostname"),
        (Structure("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}'), "oneOf"),
        (Structure("json_schema", '{"type": "string", "pattern": "(?=a)b"}'), "look"),
        (
            Structure("json_schema", '{"x-guidance": {"lenient": true}, "uniqueItems": true, "type": "array"}'),
            "uniqueItems",
        ),
        (Structure("json_schema", '{"type": "sring"}'), "sring"),
        (Structure("json_schema", "false"), "schema"),
        (Structure("json_schema", '{"$ref": "http://example.com/schema"}'), "example.com"),
        (Structure("regex", "a(b"), "regex"),
        (Structure("grammar", "start: nothing"), "nothing"),
    ],
    ids=str,
)
def test_unenforced_schema_features_are_refused(wide, structure, message):
    engine = make_engine(wide[0], num_pages=50)
    with pytest.raises(InvalidRequest, match=re.escape(message)) as error:
        engine.submit(aligned(2.0), SamplingParams(structure=structure), print)
    assert error.value.field == "structure"


def accepts(engine, structure, text):
    matcher = engine.grammars.matcher(structure)
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    return all(matcher.consume_token(id) for id in ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"properties": {"a": {"type": "integer"}}, "additionalProperties": True}, r'{"a": 1, "\u0061": "x"}'),
        ({"patternProperties": {"x": {"type": "integer"}}}, r'{"\u0078": "s"}'),
    ],
)
def test_other_spellings_of_a_name_do_not_bypass_its_rule(embedded, schema, text):
    engine = make_engine(embedded, num_pages=8)
    structure = Structure("json_schema", json.dumps({"type": "object", **schema}))
    assert not accepts(engine, structure, text)
    assert accepts(engine, structure, '{"a": 1, "b": "é\\n"}')


BOMBS = {
    "references": {"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(5000)}, "$ref": "#/$defs/a0"},
    "references to itself": {"$ref": "#"},
    "counted names": {"type": "object", "minProperties": 2},
    "size": {"enum": ["x" * 100 + str(i) for i in range(6000)]},
}


@pytest.mark.parametrize("schema", BOMBS.values(), ids=BOMBS)
def test_unsupported_schemas_are_refused(embedded, schema):
    """Quickly: some of these would crash the process, others can never be satisfied."""
    with pytest.raises(InvalidRequest, match="structure"):
        make_engine(embedded, num_pages=8).grammars.matcher(Structure("json_schema", json.dumps(schema)))


@pytest.mark.parametrize(
    "structure",
    [
        Structure("regex", "(" * 200 + "a" + ")" * 200),
        Structure("regex", r"[^\x00-\x{10FFFF}]"),
        Structure("grammar", 'start: %json {"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}'),
        Structure("choice", json.dumps(["a" * 100_000] * 6)),
    ],
    ids=["nested", "nothing", "lenient", "long"],
)
def test_invalid_regexes_choices_and_grammars_are_refused(embedded, structure):
    with pytest.raises(InvalidRequest, match="structure"):
        make_engine(embedded, num_pages=8).grammars.matcher(structure)


def test_a_structure_that_fails_during_the_reply_affects_only_its_request(wide):
    """No reply can satisfy this schema. Other requests are not affected."""
    loaded, oracle = wide
    engine = make_engine(loaded, num_pages=200)
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}
    failing = replace(GREEDY, structure=Structure("json_schema", json.dumps(schema)))
    failed, outputs = run_all(engine, [(aligned(2.0), failing), (aligned(2.0), GREEDY)])
    assert failed[-1].finish_reason == "error"
    assert isinstance(failed[-1].error, InvalidRequest)
    assert oracle.check_greedy(aligned(2.0), Setting((2.0,)), token_ids(outputs)) <= 1
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_structure_that_could_end_may_continue(wide, ignore_eos):
    """min_tokens and ignore_eos prevent an end that the structure would allow. The end token leaves no text."""
    loaded, _ = wide
    engine = make_engine(loaded, num_pages=100)
    (eos,) = engine.eos_token_ids
    structure, bias = Structure("regex", "[a-z ]*"), {eos: 100.0}
    params = SamplingParams(
        structure=structure, min_tokens=20, max_tokens=40, ignore_eos=ignore_eos, logit_bias=bias, temperature=0
    )
    (outputs,) = run_all(engine, [(aligned(2.0), params)])
    assert len(token_ids(outputs)) == (40 if ignore_eos else 21)
    assert outputs[-1].finish_reason == ("length" if ignore_eos else "stop")
    whole = replace(params, structure=Structure("regex", "[a-z]{2}"), min_tokens=0)
    (outputs,) = run_all(engine, [(aligned(2.0), whole)])
    assert re.fullmatch("[a-z]{2}", "".join(output.text for output in outputs))
    assert outputs[-1].finish_reason == "stop"


# The cost of bombs


def of_json(schema):
    return Structure("json_schema", json.dumps(schema))


def property_names(num):
    return {f"property_{i}": {"type": "integer"} for i in range(num)}


HARD = {"pattern": "^.*a.{20}z$"}
DOUBLINGS = "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(9))
BOMBS = {
    "a thousand times a thousand": Structure("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "all of Unicode": Structure("regex", r"(\w{1,1000}\W){1,1000}"),
    "which of the last to remember": Structure("regex", "(.|\\n)*a(.|\\n){200}b"),
    "ten to the ninth": Structure("regex", "a{1,1000000000}"),
    "backtracking": Structure("regex", "(a|a|aa)*(a|aa)*(a*)*b"),
    "one literal": Structure("regex", "x" * 300_000),
    "one choice": Structure("choice", json.dumps(["ab" * 60_000])),
    "many choices": Structure("choice", json.dumps([f"choice number {i}" for i in range(20_000)])),
    "many constants": of_json({"properties": {f"p{i}": {"const": "x" * 7000} for i in range(16)}}),
    "many properties": of_json({"type": "object", "properties": property_names(4000)}),
    "properties in combinations": of_json(
        {"allOf": [{"anyOf": [{"properties": {f"q{i}_{j}": {}}} for j in range(30)]} for i in range(2)]}
    ),
    "merged properties": of_json(
        {
            "$defs": {"a": {"properties": property_names(400)}},
            "properties": {
                f"r{i}": {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {f"q{i}": {}}}]} for i in range(50)
            },
        }
    ),
    "patterns at once": of_json({"allOf": [{"pattern": f"^.*{chr(97 + i)}.{{{i + 1}}}z$"} for i in range(20)]}),
    "patterns at once, by reference": of_json(
        {
            "$defs": {f"d{i}": {"pattern": f"{i}.*z$", "$ref": f"#/$defs/d{i + 1}"} for i in range(20)} | {"d20": HARD},
            "$ref": "#/$defs/d0",
        }
    ),
    "patterns of names": of_json({"patternProperties": {f"^k{i}_.*$": {} for i in range(300)}}),
    "a large multiple": of_json({"type": "integer", "multipleOf": 999_983}),
    "a common multiple": of_json({"allOf": [{"type": "integer", "multipleOf": p} for p in (1009, 1013)]}),
    "many multiples": of_json({"properties": {f"p{i}": {"type": "integer", "multipleOf": 9991} for i in range(200)}}),
    "a reference to itself": of_json({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 2}}, "$ref": "#/$defs/a"}),
    "a long way": of_json(
        {
            "$defs": {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(490)},
            "$ref": "#/$defs/d0",
        }
    ),
    "nothing, often": Structure("grammar", 'start: "x" ' + "a? " * 30_000 + '\na: "a" | "b" a'),
    "nothing, as often as may be": Structure("grammar", 'start: "x" ' + "a? " * 1200 + '\na: "a" | "b" a'),
    "doublings": Structure("grammar", f'start: T0\n{DOUBLINGS}\nT9: "{"xy" * 500}"'),
    "ambiguity": Structure("grammar", "start: s\ns: s s s s | s s | A | B\nA: /[a-z ]+/\nB: /[a-z]+ ?/"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_grammar_bomb_takes_little_time_and_memory(name, bombed):
    """Other requests wait for compilation and masks, so both must be fast. Times are CPU seconds of this thread (the
    worst bombs need a fifth of the limits here), so that other load does not count. Memory is in bytes; the cache may
    hold 1 GB in total.
    """
    grammars, words = bombed
    grammars._compiled.cache_clear()
    before, began = resident_bytes(), time.thread_time()
    matcher, message = None, ""
    try:
        matcher = grammars.matcher(BOMBS[name])
    except InvalidRequest as error:
        message = str(error)
    seconds = time.thread_time() - began
    rng, longest = random.Random(0), 0.0
    while matcher and not matcher.is_stopped() and rng.random() > 0.02:
        began = time.thread_time()
        mask = matcher.allowed(max(words) + 1)
        longest = max(longest, time.thread_time() - began)
        allowed = [i for i in words if mask[i]]
        if not allowed or not matcher.consume_token(max(rng.sample(allowed, min(3, len(allowed))), key=words.get)):
            break
    assert len(message) < 1000
    assert "backtrace" not in message
    assert seconds < 2
    assert longest < 0.1
    assert resident_bytes() - before < 100 << 20


@pytest.fixture(scope="module")
def bombed(embedded):
    """Grammars over the real vocabulary, and the length of each token."""
    grammars = make_engine(embedded, num_pages=8).grammars
    grammars.matcher(Structure("regex", "a"))
    return grammars, {id: len(token) for token, id in embedded.tokenizer.get_vocab().items()}


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": property_names(500), "required": list(property_names(500))},
        {"type": "object", "properties": property_names(500)},
        {"enum": [f"Town number {i}" for i in range(5000)]},
        {"type": "array", "items": {"allOf": [{"$ref": "#/$defs/a"}]}, "$defs": {"a": HARD}},
        {"properties": {f"p{i}": {**HARD, "description": "x" * 2000} for i in range(40)}},
        {"properties": {f"p{i}": {"type": "number", "multipleOf": 0.01} for i in range(100)}},
        {"type": "integer", "multipleOf": 86_400},
        {"properties": {"pattern": {"type": "string"}, "multipleOf": {"type": "integer"}, "$ref": {"const": 1}}},
    ],
)
def test_large_schemas_of_real_users_are_served(bombed, schema):
    grammars, _ = bombed
    assert not grammars.matcher(of_json(schema)).is_error()


def test_short_requests_do_not_wait_behind_long_ones(bombed):
    grammars, _ = bombed
    released = threading.Event()
    try:
        for _ in range(20):
            grammars.pool(of_json(property_names(1000))).submit(released.wait)
        short = grammars.pool(STRUCTURES[0]).submit(grammars.matcher, STRUCTURES[0])
        assert not short.result(timeout=30).is_error()
    finally:
        released.set()
