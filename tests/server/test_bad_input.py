"""Hostile input is refused with a clear error, and other requests do not wait for it."""

import contextlib
import itertools
import json
import threading
import time

import httpx
import pytest

from linalign.server.protocol.strict_json import MAX_VALUES, strict

pytestmark = pytest.mark.slow

POST = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]
CHAT, COMPLETIONS, RESPONSES, TOKENIZE, DETOKENIZE = POST
HELLO = [{"role": "user", "content": "Hello"}]
MEGABYTE = "na " * 350_000
MAX_STALL = 1.0  # seconds that a running stream may pause


def body_for(path, **fields):
    required = {
        CHAT: {"messages": HELLO, "max_tokens": 1},
        COMPLETIONS: {"prompt": "Hello", "max_tokens": 1},
        RESPONSES: {"input": "Hello", "max_output_tokens": 1},
        TOKENIZE: {"messages": HELLO},
        DETOKENIZE: {"tokens": [5]},
    }[path]
    return {"model": "smollm2", **required, **fields}


def post(url, path, body, content_type="application/json"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url + path, content=data, headers={"Content-Type": content_type}, timeout=60)


def nested(levels, inner="1", kind="array"):
    """JSON text of `levels` nested arrays or objects around `inner`."""
    begin, end = ("[", "]") if kind == "array" else ('{"a":', "}")
    return begin * levels + inner + end * levels


def tool(**function):
    return {"type": "function", "function": {"name": "f", **function}}


CALL = {"call_id": "a", "name": "f"}


def called_with(*arguments):
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": one}} for one in arguments]
    return {"messages": [*HELLO, {"role": "assistant", "tool_calls": calls}]}


def assert_refused(response, param=None, words=""):
    assert response.status_code == 400, response.text[:500]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or "")
    assert error["param"] is not None or param is None
    assert words in error["message"]
    assert len(response.content) < 10_000
    assert "/" not in error["message"].replace("application/json", "").replace("/v1/", "")


# Invalid JSON, and too much of it


@pytest.mark.parametrize("kind", ["array", "object"])
@pytest.mark.parametrize("path", POST)
def test_a_body_nested_10_000_levels_deep_is_refused(url, path, kind):
    assert_refused(post(url, path, nested(10_000, kind=kind).encode()), None, "nested too deeply")


DEEP = json.loads(nested(500, kind="object"))
PLACES = {
    "parameters": (CHAT, {"tools": [tool(parameters={"type": "object", "x": DEEP})]}),
    "parameters to tokenize": (TOKENIZE, {"tools": [tool(parameters={"type": "object", "x": DEEP})]}),
    "parameters of a response": (RESPONSES, {"tools": [{"type": "function", "name": "f", "parameters": DEEP}]}),
    "schema": (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": DEEP}}}),
    "schema of a text": (
        COMPLETIONS,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": DEEP}}},
    ),
    "schema of a response": (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a", "schema": DEEP}}}),
    "metadata": (CHAT, {"metadata": DEEP}),
    "messages": (CHAT, {"messages": DEEP}),
    "a field of no meaning": (DETOKENIZE, {"nothing": DEEP}),
}


@pytest.mark.parametrize("levels", [500, 10_000])
@pytest.mark.parametrize("place", PLACES)
def test_deep_nesting_is_refused_in_every_field(url, place, levels):
    path, fields = PLACES[place]
    text = json.dumps(body_for(path, **fields)).replace(json.dumps(DEEP), nested(levels, kind="object"))
    assert_refused(post(url, path, text.encode()), None, "nested too deeply")


def test_realistic_nesting_is_accepted(url):
    parameters = {"type": "object", "properties": {"a": json.loads(nested(60, "{}", "object"))}}
    assert post(url, CHAT, body_for(CHAT, tools=[tool(parameters=parameters)])).status_code == 200


ARGUMENTS = {
    "deep": nested(10_000, kind="object"),
    "rather deep": nested(500, kind="object"),
    "many digits": '{"a": ' + "9" * 5000 + "}",
    "too large": '{"a": 1e999}',
    "not a number": '{"a": NaN}',
    "half a pair": '{"a": "\\ud800"}',
    "half a pair in a name": '{"\\udfff": 1}',
    "a key twice": '{"a": 1, "a": 2}',
    "a list": "[]",
    "nothing": "null",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_no_json_object_are_shown_as_text(url, name):
    text = ARGUMENTS[name]
    for path in (CHAT, TOKENIZE):
        assert_served_if_it_fits(post(url, path, body_for(path, **called_with(text))), "messages")
    item = {"type": "function_call", **CALL, "arguments": text}
    assert_served_if_it_fits(post(url, RESPONSES, body_for(RESPONSES, input=[item])), "input")


def assert_served_if_it_fits(response, param):
    if response.status_code != 200:
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


TEXT = json.dumps(body_for(CHAT, messages=[{"role": "user", "content": "é"}]), ensure_ascii=False)
BODIES = {
    "nothing": (b"", "JSON object"),
    "null": (b"null", "JSON object"),
    "a list": (b"[]", "JSON object"),
    "a string": (b'"smollm2"', "JSON object"),
    "a number": (b"1", "JSON object"),
    "cut off": (TEXT[:-3].encode(), "JSON"),
    "more behind": (TEXT.encode() + b"{}", "JSON"),
    "UTF-16": (TEXT.encode("utf-16"), "UTF-8"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "UTF-8"),
    "UTF-32": (TEXT.encode("utf-32"), "UTF-8"),
    "Latin-1": (TEXT.encode("latin-1"), "UTF-8"),
    "an overlong encoding": (TEXT.encode().replace("é".encode(), b"\xc0\xaf"), "UTF-8"),
    "a surrogate in UTF-8": (TEXT.encode().replace("é".encode(), b"\xed\xa0\x80"), "UTF-8"),
    "two marks": (b"\xef\xbb\xbf\xef\xbb\xbf" + TEXT.encode(), "JSON"),
    "a NUL as such": (TEXT.encode().replace("é".encode(), b"\x00"), "JSON"),
    "single quotes": (TEXT.replace('"', "'").encode(), "JSON"),
    "a comment": (b"/* */" + TEXT.encode(), "JSON"),
    "many digits": (TEXT.replace('"max_tokens": 1', '"max_tokens": ' + "1" * 5000).encode(), "digits"),
    "a key twice": (TEXT.replace('"max_tokens"', '"model": "other", "max_tokens"').encode(), "'model'"),
    "a key twice, further inside": (TEXT.replace('"role"', '"role": "system", "role"').encode(), "'role'"),
    "a key twice, spelt otherwise": (TEXT.replace('"role"', '"r\\u006fle": "system", "role"').encode(), "'role'"),
    "many keys": (json.dumps({f"k{i}": 1 for i in range(90_000)}).encode(), "keys"),
    "many numbers": (b'{"messages": [' + b"1.5," * 1_900_000 + b"1.5]}", "values"),
    "many lists": (b'{"messages": [' + b"[]," * 2_600_000 + b"[]]}", "values"),
    "many lists in few": (b'{"messages": [' + b"[[[[[[[[9]]]]]]]]," * 40_000 + b"[]]}", "values"),
    "many names": (b'{"messages": [' + b'{"a":9},' * 200_000 + b"{}]}", "values"),
    "many values, and no JSON": (b'{"messages": [' + b"null," * 400_000 + b"?", "values"),  # counted before parsing
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_not_json_objects_in_utf_8_are_refused(url, name):
    body, words = BODIES[name]
    for path in POST if len(body) < 1000 else [CHAT]:
        assert_refused(post(url, path, body), None, words)


def test_adjacent_numbers_are_counted_separately():
    assert strict('{"a": [' + "1.5, 1e5, " * 49_000 + "1]}")
    with pytest.raises(ValueError, match=f"more than {MAX_VALUES} values"):
        strict('{"a": [' + "1.5, 1e5, " * 51_000 + "1]}")


@pytest.mark.parametrize("value", ['"a"', '"\\"[,"', "{}", "1.5", "1e5", "-1E5", "true", "false", "null"])
def test_values_are_counted_exactly(value):
    beside = 3  # values besides the list's items: the object, its key and the list
    strict('{"a": [' + ", ".join([value] * (MAX_VALUES - beside)) + "]}")
    with pytest.raises(ValueError, match=f"more than {MAX_VALUES} values"):
        strict('{"a": [' + ", ".join([value] * (MAX_VALUES - beside + 1)) + "]}")


@pytest.mark.parametrize("text", ["[1, -2, {}], " * 400_000, '\\" [, ' * 400_000, '"'])
def test_characters_within_strings_are_not_values(text):
    assert strict(json.dumps({"a": text, "b": [*range(400_000)]})) == {"a": text, "b": [*range(400_000)]}


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/png", ""]
)
@pytest.mark.parametrize("path", POST)
def test_other_content_types_are_refused(url, path, kind):
    assert_refused(post(url, path, body_for(path), kind), None, "Content-Type: application/json")


def test_a_byte_order_mark_changes_nothing(url):
    assert post(url, CHAT, b"\xef\xbb\xbf" + TEXT.encode()).status_code == 200


# Fields that are too large, too many or invalid

BIASES = {str(i): 1 for i in range(2000)}
FIELDS = {
    "n": ({"n": 10**6}, "n"),
    "n of 400 digits": ({"n": 10**400}, "n"),
    "biases": ({"logit_bias": BIASES}, "logit_bias"),
    "no such bias": ({"logit_bias": {"9" * 9: 1}}, "logit_bias"),
    "many wrong biases": ({"logit_bias": {f"x{i}": "a" for i in range(9000)}}, "logit_bias"),
    "a megabyte of principle": ({"principle": MEGABYTE}, None),
    "a megabyte of a list": ({"stop": ["a"] * 90_000}, "stop"),
    "an empty principle": ({"principle": " "}, "principle"),
    "infinity": ({"temperature": float("inf")}, "temperature"),
    "not a number": ({"alignment_ratio": float("nan")}, "alignment_ratio"),
    "half a pair": ({"principle": "\ud800"}, "principle"),
    "half a pair in a name": ({"\udc00": 1}, "?"),
    "a long name": ({"principle" * 100_000: 1}, "principle"),
    "a seed of 400 digits": ({"seed": 10**400}, "seed"),
    "min_tokens of 400 digits": ({"min_tokens": 10**400}, "min_tokens"),
    "stop tokens": ({"stop_token_ids": [-1] * 200_000}, "stop_token_ids"),
    "many choices": ({"structured_outputs": {"choice": ["x"] * 90_000}}, "structured_outputs"),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", FIELDS)
def test_fields_beyond_their_bounds_are_refused(url, name, path):
    fields, param = FIELDS[name]
    assert_refused(post(url, path, body_for(path, **fields)), param)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_limits_and_unknown_names_of_any_size_are_accepted(url, path):
    for fields in ({"max_tokens": 10**400, "stop": ["e", "a", "o", " "]}, {"k" * 1_000_000: 1}):
        assert post(url, path, body_for(path, **fields)).status_code == 200


def test_100_000_biases_are_refused(url):
    biases = {str(i): 1 for i in range(100_000)}
    for path in (CHAT, COMPLETIONS):
        assert_refused(post(url, path, body_for(path, logit_bias=biases)), None, "more than 100000 values")


ARRAY = '{"a": [' + "{}, " * 90_000 + "{}]}"
LONG = {
    "a message": (CHAT, {"messages": [{"role": "user", "content": MEGABYTE}]}, "messages"),
    "messages": (CHAT, {"messages": HELLO * 19_000}, "messages"),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 19_000}]}, "messages"),
    "tools": (CHAT, {"tools": [tool(name=f"f{i}") for i in range(12_000)]}, "tools"),
    "a description": (CHAT, {"tools": [tool(description=MEGABYTE)]}, "messages"),
    "a tool's output": (
        CHAT,
        {"messages": [*HELLO, {"role": "tool", "tool_call_id": "a", "content": MEGABYTE}]},
        "messages",
    ),
    "a prompt": (COMPLETIONS, {"prompt": MEGABYTE}, "prompt"),
    "prompts": (COMPLETIONS, {"prompt": ["a"] * 20_000}, "prompt"),
    "token ids": (COMPLETIONS, {"prompt": [5] * 2_700_000}, "prompt"),
    "lists of token ids": (COMPLETIONS, {"prompt": [[5] * 12] * 90_000}, "prompt"),
    "a long list of token ids": (COMPLETIONS, {"prompt": [[5], [5] * 2_700_000]}, "prompt"),
    "an input": (RESPONSES, {"input": MEGABYTE}, "input"),
    "arguments": (CHAT, called_with(*[ARRAY] * 20), "messages"),
    "arguments of items": (RESPONSES, {"input": [{"type": "function_call", **CALL, "arguments": ARRAY}] * 20}, "input"),
    "items": (RESPONSES, {"input": HELLO * 19_000}, "input"),
    "instructions": (RESPONSES, {"instructions": MEGABYTE}, "input"),
    "objects that are no messages": (CHAT, {"messages": [{}] * 90_000}, "messages.0"),
    "numbers that are no messages": (CHAT, {"messages": [0] * 2_000_000}, "messages.0"),
}


@pytest.mark.parametrize("name", LONG)
def test_far_too_long_texts_are_refused(url, name):
    path, fields, param = LONG[name]
    assert_refused(post(url, path, body_for(path, **fields)), param)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stop_string_of_a_megabyte_works(url, path):
    response = post(url, path, body_for(path, stop=["na" * 500_000, *"aeiou "], temperature=0, max_tokens=9))
    assert response.status_code == 200
    assert response.json()["choices"][0]["finish_reason"] == "stop"


# Other requests do not wait


@contextlib.contextmanager
def bystander(url):
    """Runs a long stream of another client meanwhile. Yields the list of times at which its chunks arrive."""
    times, leave = [], threading.Event()

    def listen():
        body = body_for(CHAT, max_tokens=6000, temperature=0, stream=True, ignore_eos=True)
        with httpx.stream("POST", url + CHAT, json=body, timeout=60) as response:
            for _ in response.iter_lines():
                times.append(time.monotonic())
                if leave.is_set():
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        while len(times) < 10:
            assert thread.is_alive()
            time.sleep(0.01)
        yield times
    finally:
        assert thread.is_alive(), "the reply ended before the measurement did"
        leave.set()
        thread.join()


def longest_gap(times):
    return max(after - before for before, after in itertools.pairwise(times))


@pytest.mark.alone  # these two tests measure times
def test_refused_requests_delay_no_other_request(url):
    """Uses the median of three rounds' longest gaps, because the machine may do other work."""
    bodies = [body for body, _ in BODIES.values()]
    bodies += [json.dumps(body_for(CHAT, **fields)).encode() for fields, _ in FIELDS.values()]
    gaps = []
    for _ in range(3):
        with bystander(url) as times:
            for body in bodies:
                post(url, CHAT, body)
            for path, fields, _ in LONG.values():
                post(url, path, body_for(path, **fields))
            times.append(time.monotonic())
            gaps.append(longest_gap(list(times)))
    assert sorted(gaps)[1] < MAX_STALL, gaps


BOMBS = [
    {"structured_outputs": {"regex": "((a{1,1000}){1,1000}){1,1000}"}},
    {"structured_outputs": {"regex": "(.|\\n)*a(.|\\n){200}b"}},
    {"structured_outputs": {"regex": "x" * 16_000}},
    {"structured_outputs": {"choice": ["ab" * 8000]}},
    {"structured_outputs": {"grammar": 'start: "x" ' + "a? " * 1200 + '\na: "a" | "b" a'}},
    *(
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
        for schema in (
            {"allOf": [{"pattern": f"^.*{chr(97 + i)}.{{{i + 1}}}z$"} for i in range(20)]},
            {"allOf": [{"type": "integer", "multipleOf": p} for p in (1009, 1013)]},
            {"type": "integer", "multipleOf": 999_983},
            {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}},
            {"const": "x" * 16_000},
        )
    ),
]


@pytest.mark.alone
def test_grammar_bombs_delay_no_other_request(url):
    """While bombs are compiled and decoded, all at once, a stream continues and a short structure is served."""
    gaps = []
    for _ in range(3):
        with bystander(url) as times:
            statuses = []

            def ask(bomb, statuses=statuses):
                statuses.append(post(url, CHAT, body_for(CHAT, max_tokens=8, **bomb)).status_code)

            threads = [threading.Thread(target=ask, args=(bomb,)) for bomb in BOMBS]
            for thread in threads:
                thread.start()
            short = post(url, CHAT, body_for(CHAT, structured_outputs={"choice": ["yes", "no"]}))
            assert short.json()["choices"][0]["finish_reason"] in ("stop", "length")
            for thread in threads:
                thread.join()
            assert set(statuses) <= {200, 400}
            times.append(time.monotonic())
            gaps.append(longest_gap(list(times)))
    assert sorted(gaps)[1] < MAX_STALL, gaps
