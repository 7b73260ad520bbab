"""Messages that a chat template can't show as they are."""

import copy

import pytest

from linalign.alignment_core.text.chat_template import ChatTemplate, Rendering
from linalign.alignment_core.text.message_rewriting import with_single_calls, without_system_role

USER = {"role": "user", "content": "Hi"}
# As DeepSeek-R1's and V3's: arguments are joined with other texts.
JOINED = """{% for m in messages %}{{ m.role + ': ' + (m.content or '') }}{% for c in m.tool_calls %}
{{- ' call ' + c.function.name + ' ' + c.function.arguments }}{% endfor %}
{% endfor %}{{ tools | length if tools }}"""
# As Llama 3.1's: two calls in a message are refused.
SINGLE = """{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('single calls only') }}{% endif %}
{{- m.tool_calls[0].function | tojson }}{% endif %}
{% endfor %}{{ tools | length if tools }}"""


def call(id, name="f", **arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, **message):
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **message}


def result(id, content):
    return {"role": "tool", "tool_call_id": id, "content": content}


A, B, C = (call(id, id) for id in "abc")


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ("", ["a", "b", "c"]),
        ("abc", ["a", "1", "b", "2", "c", "3"]),
        ("cba", ["a", "3", "b", "2", "c", "1"]),
        ("aba", ["a", "1", "3", "b", "2", "c"]),
        ("xyz", ["a", "1", "b", "2", "c", "3"]),  # unknown ids
        ("xyzz", ["a", "1", "b", "2", "c", "3", "4"]),
    ],
)
def test_results_stay_behind_their_calls(results, expected):
    messages = [calling(A, B, C, content="So."), *(result(id, str(i)) for i, id in enumerate(results, 1)), USER]
    split = with_single_calls([USER, *messages])
    assert split[0] == split[-1] == USER
    shown = [m["tool_calls"][0]["id"] if "tool_calls" in m else m["content"] for m in split[1:-1]]
    assert shown == expected
    assert [m["content"] for m in split if m["role"] == "assistant"] == ["So.", "", ""]


@pytest.mark.parametrize("id", ["", "same"])
def test_results_of_calls_with_equal_ids_are_in_their_order(id):
    calls = [call(id, name) for name in "abc"]
    split = with_single_calls([calling(*calls), *(result(id, str(i)) for i in range(3))])
    shown = [m["tool_calls"][0]["function"]["name"] if "tool_calls" in m else m["content"] for m in split]
    assert shown == ["a", "0", "b", "1", "c", "2"]


def test_many_calls_take_little_time():
    """A quadratic function would need minutes."""
    number = 100_000
    messages = [calling(*(call(str(i)) for i in range(number))), *(result(str(i), "") for i in range(number))]
    assert len(with_single_calls(messages)) == 2 * number


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("su", ["u: s0\n\nu1"]),
        ("ssu", ["u: s0\n\ns1\n\nu2"]),
        ("usau", ["u: u0", "a: a2", "u: s1\n\nu3"]),
        ("us", ["u: u0\n\ns1"]),
        ("usa", ["u: u0\n\ns1", "a: a2"]),
        ("uas", ["u: u0", "a: a1", "u: s2"]),
        ("s", ["u: s0"]),
        ("sa", ["u: s0", "a: a1"]),
    ],
)
def test_system_texts_become_texts_of_the_user(roles, expected):
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": f"{role}{place}"} for place, role in enumerate(roles)]
    assert [f"{m['role'][0]}: {m['content']}" for m in without_system_role(messages)] == expected


def text(tokenizer, template, *messages):
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return ChatTemplate(changed).text([USER, *messages], Rendering())


def test_a_template_that_joins_texts_gets_json(tokenizer):
    shown = text(tokenizer, JOINED, calling(call("a", x=[1, "é"]), call("b", y=2)))
    assert 'call f {"x": [1, "é"]} call f {"y": 2}' in shown
    broken = calling({"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": '}})
    assert 'call f {"x": ' in text(tokenizer, JOINED, broken)


def test_a_template_of_single_calls_gets_each_call_in_a_message(tokenizer):
    shown = text(tokenizer, SINGLE, calling(call("a", x=1), call("b", y=2)), result("a", "one"), result("b", "two"))
    places = [shown.index(part) for part in ('"x": 1', "one", '"y": 2', "two")]
    assert places == sorted(places)
