"""Replies in OpenAI's harmony format: channels, reasoning, calls, structures and budgets."""

import copy
import json

import httpx
import jsonschema
import pytest

from linalign.alignment_core.decoding.grammars import Grammars
from linalign.server.deltas import message_of
from linalign.server.harmony import HarmonyParser
from linalign.server.tool_grammars import required_calls
from tests.engines import tiny_pair
from tests.server.test_fields import WEATHER
from tests.server.test_reasoning import CHAT, FORMAT, SCHEMA, choice, post, streamed
from tests.server.test_tool_grammars import accepts
from tests.serving import serving

pytestmark = pytest.mark.slow

START = "<|start|>assistant"
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
CALL, ARGUMENTS = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>", '{"city": "Rome"}'
MARKS = [f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "return", "call")]
# As gpt-oss's: it writes a tool's description, the first call of a message, and either its content or its reasoning.
TEMPLATE = """<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>
{%- if messages[0].role == 'system' or tools %}<|start|>developer<|message|>
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools %}{{ '// ' + tool.function.description + '\\n' + tool.function.name }}
{%- for name, p in (tool.function.parameters or {'properties': {}}).properties.items() %}{{ name }}
{%- if p.default is defined %}{{ ', default: ' + p.default }}{% endif %}{% endfor %}{% endfor %}<|end|>
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}
{%- if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>
{%- elif m.role == 'tool' %}<|start|>functions to=assistant<|message|>{{ m.content }}<|end|>
{%- elif m.tool_calls %}
{%- if m.content and m.thinking %}{{ raise_exception('either content or thinking') }}{% endif %}
{%- if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>
{%- endif %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>
{{- m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{{ begin }}{% endif %}"""

REPLIES = {
    "answer": (f"{FINAL}Yes.<|return|>", {"content": "Yes."}),
    "thoughts": (f"{ANALYSIS}Hm.<|end|>{START}{FINAL}Yes.", {"content": "Yes.", "reasoning_content": "Hm."}),
    "more thoughts": (f"{ANALYSIS}Hm.<|end|>{START}{ANALYSIS} So<|end|>", {"reasoning_content": "Hm.\n So"}),
    "preamble and answer": (
        f"<|channel|>commentary<|message|>I look.<|end|>{START}{FINAL}Done.",
        {"content": "I look.\nDone."},
    ),
    "marks without meaning": (
        f"{ANALYSIS}a <|message|>b<|constrain|><|end|>{START}{FINAL}Yes.",
        {"reasoning_content": "a b", "content": "Yes."},
    ),
    "space behind the role": (
        f"{ANALYSIS}Hm.<|end|>{START} \n{FINAL}Yes.",
        {"reasoning_content": "Hm.", "content": "Yes."},
    ),
    "operators": ("f <|map", {"content": "f <|map"}),
    "an operator at the end": ("f <|\n", {"content": "f <|\n"}),
    "call": (f"{CALL}{ARGUMENTS}<|call|>", {"calls": [("weather", ARGUMENTS)]}),
    "call, with the callee first": (
        f" to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}",
        {"calls": [("weather", ARGUMENTS)]},
    ),
    "call behind thoughts": (
        f"{ANALYSIS}Hm.<|end|>{START}{CALL}{ARGUMENTS}",
        {"reasoning_content": "Hm.", "calls": [("weather", ARGUMENTS)]},
    ),
    "preamble": (
        f"<|channel|>commentary<|message|>I look.<|end|>{START}{CALL}{ARGUMENTS}<|call|>",
        {"content": "I look.", "calls": [("weather", ARGUMENTS)]},
    ),
    "call without arguments": (CALL + "<|call|>", {"calls": [("weather", "{}")]}),
    "call of which only the header is there": (CALL, {}),
    "call that is cut off": (CALL + ARGUMENTS[:5], {"calls": [("weather", ARGUMENTS[:5])]}),
    "two calls": (
        f"{CALL}1<|call|>{START}{CALL}2<|call|>",
        {"calls": [("weather", "1"), ("weather", "2")]},
    ),
    "format": (f"<|channel|>final <|constrain|>json<|message|>{ARGUMENTS}", {"content": ARGUMENTS}),
    "a tool of the model": (
        "<|channel|>analysis to=python code<|message|>1 + 1<|call|>",
        {"reasoning_content": "1 + 1"},
    ),
    "a tool's message": (
        f"<|start|>functions.weather to=assistant<|channel|>commentary<|message|>9<|end|>{START}{FINAL}Yes.",
        {"content": "Yes."},
    ),
    "no marks": ("Yes. a < b, a <| b <", {"content": "Yes. a < b, a <| b <"}),
    "a long text": ("Yes. " * 100, {"content": "Yes. " * 100}),
    "a text that looks like a header": (" to be or not", {"content": " to be or not"}),
    "a mark that has begun": (f"{FINAL}Yes.<|retu", {"content": "Yes."}),
    "a header that has begun": (f"{FINAL}Yes.<|end|>{START} to=func", {"content": "Yes."}),
}


def parsed(parser, text, size):
    message = message_of(
        [delta for i in range(0, len(text), size) for delta in parser.feed(text[i : i + size])] + parser.finish()
    )
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.pop("tool_calls", [])]
    return {name: value for name, value in {**message, "calls": calls}.items() if name != "role" and value}


@pytest.mark.parametrize(("text", "expected"), REPLIES.values(), ids=REPLIES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_messages_are_found_for_any_chunking(text, expected, size):
    assert parsed(HarmonyParser(f"<|start|>user<|message|>Hm?<|end|>{START}", True), text, size) == expected


def test_a_header_without_end_takes_bounded_memory():
    parser = HarmonyParser(START, True)
    for text in ["<|channel|>final", *["x"] * 10_000]:
        assert parser.feed(text) == []
    assert len(parser._header) < 300
    assert parser.finish() == []


def test_what_the_template_has_begun():
    assert parsed(HarmonyParser(START + ANALYSIS, True), f"Hm.<|end|>{START}{FINAL}Yes.", 5) == {
        "content": "Yes.",
        "reasoning_content": "Hm.",
    }
    assert parsed(HarmonyParser("", True), "a town.<|return|>", 3) == {"content": "a town."}


def test_calls_that_the_request_does_not_allow():
    two, _ = REPLIES["two calls"]
    assert parsed(HarmonyParser(START, True, max_calls=1), two, 1) == {"calls": [("weather", "1")]}
    assert parsed(HarmonyParser(START, False), CALL + ARGUMENTS, 1) == {"reasoning_content": ARGUMENTS}


@pytest.fixture(scope="module", params=["control tokens", "texts"])
def gpt_oss(request, tokenizer):
    """A tokenizer with a template of gpt-oss's kind, in which the marks are control tokens, or are none."""
    changed = copy.deepcopy(tokenizer)
    if request.param == "control tokens":
        changed.add_special_tokens({"additional_special_tokens": MARKS})
    changed.chat_template = TEMPLATE
    return changed


@pytest.fixture(scope="module")
def server(gpt_oss, tmp_path_factory):
    loaded, _ = tiny_pair(gpt_oss, kernels=False, max_position_embeddings=1024)
    path = tmp_path_factory.mktemp("harmony") / "oss"
    loaded.model.save_pretrained(path)
    gpt_oss.save_pretrained(path)
    with serving(str(path)) as (url, _):
        yield url


def biased(tokenizer, channel):
    """Fields that make the random model begin with this channel, if a grammar allows it."""
    firsts = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ("<|channel|>", channel)]
    return {"logit_bias": {str(token): 90 for token in firsts}}


ALIGNED = {"principle": "Encourage cycling.", "alignment_ratio": 2}
PLAIN_AND_ALIGNED = pytest.mark.parametrize("extra", [{}, ALIGNED], ids=["plain", "aligned"])


@PLAIN_AND_ALIGNED
def test_a_format_holds_with_and_without_reasoning(server, gpt_oss, extra):
    for channel in ("analysis", "final"):
        fields = {"response_format": FORMAT, "thinking_token_budget": 5, **biased(gpt_oss, channel), **extra}
        whole = choice(server, **fields)
        assert whole["finish_reason"] == "stop"
        assert bool(whole["message"].get("reasoning_content")) == (channel == "analysis")
        jsonschema.validate(json.loads(whole["message"]["content"]), SCHEMA)
        message, calls, reason = streamed(server, **fields)
        assert (message["content"], calls, reason) == (whole["message"]["content"], [], "stop")
        assert message.get("reasoning_content") == whole["message"].get("reasoning_content")


@PLAIN_AND_ALIGNED
def test_required_calls_come_with_and_without_reasoning(server, gpt_oss, extra):
    for channel in ("analysis", "comment"):
        fields = {"tools": [WEATHER], "tool_choice": "required", "thinking_token_budget": 5}
        fields |= {**biased(gpt_oss, channel), **extra}
        whole = choice(server, **fields)
        assert whole["finish_reason"] == "tool_calls"
        assert bool(whole["message"].get("reasoning_content")) == (channel == "analysis")
        message, ((name, arguments),), reason = streamed(server, **fields)
        assert (name, reason) == (WEATHER["function"]["name"], "tool_calls")
        jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])
        assert [call["function"] for call in whole["message"]["tool_calls"]] == [{"name": name, "arguments": arguments}]
        assert not message.get("content")


def test_a_format_beside_tools_allows_both(server, gpt_oss):
    fields = {"response_format": FORMAT, "tools": [WEATHER]}
    text = choice(server, **fields, **biased(gpt_oss, "final"))
    jsonschema.validate(json.loads(text["message"]["content"]), SCHEMA)
    call = choice(server, **fields, **biased(gpt_oss, "comment"))
    assert (call["finish_reason"], len(call["message"]["tool_calls"])) == ("tool_calls", 1)


def test_strict_tools_beside_text(server, gpt_oss):
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    call = choice(server, tools=[strict], **biased(gpt_oss, "comment"))
    (function,) = (call["function"] for call in call["message"]["tool_calls"])
    jsonschema.validate(json.loads(function["arguments"]), WEATHER["function"]["parameters"])
    text = choice(server, tools=[strict], **biased(gpt_oss, "final"))
    assert text["message"]["content"]
    assert "tool_calls" not in text["message"]


@pytest.mark.parametrize("structure", [{"choice": ["yes", "no"]}, {"regex": "[ab]{3}"}, {"grammar": 'start: "x" "y"'}])
def test_a_structure_is_the_whole_answer(server, structure):
    for budget in (0, 1, 2, 3, 7):
        begun = {"chat_template_kwargs": {"begin": ANALYSIS}, "thinking_token_budget": budget}
        for fields in ({"thinking_token_budget": budget}, begun):
            reply = choice(server, structured_outputs=structure, **fields)
            content = reply["message"]["content"]
            assert content in ("yes", "no", "xy") or (len(content) == 3 and set(content) <= {"a", "b"})
            assert reply["finish_reason"] == "stop"


def test_a_budget_holds_if_the_model_has_begun_the_mark_itself(server, gpt_oss):
    """The budget ends within the mark that the model writes, and a grammar allows nothing else behind its beginning."""
    bias = dict.fromkeys(map(str, gpt_oss.encode("<|end|>", add_special_tokens=False)), 95)
    for budget in range(1, 7):
        fields = {"thinking_token_budget": budget, "logit_bias": bias, "response_format": FORMAT}
        reply = choice(server, chat_template_kwargs={"begin": ANALYSIS}, **fields)
        jsonschema.validate(json.loads(reply["message"]["content"]), SCHEMA)


def test_a_budget_ends_reasoning_that_the_template_begins(server, gpt_oss):
    begun = {"chat_template_kwargs": {"begin": ANALYSIS}}
    for budget in (0, 6):
        reply = choice(server, thinking_token_budget=budget, logprobs=True, **begun)
        tokens = [token["token"] for token in reply["logprobs"]["content"]]
        mark = [gpt_oss.decode([id]) for id in gpt_oss.encode(f"<|end|>{START}{FINAL}", add_special_tokens=False)]
        assert tokens[budget : budget + len(mark)] == mark  # the answer must follow
        message = reply["message"]
        assert bool(message.get("reasoning_content")) == (budget > 0)
        assert message["content"]
    free = choice(server, **begun)["message"]
    assert free["reasoning_content"].startswith(message["reasoning_content"])
    assert not free["content"]


def test_a_continued_answer_is_content(server):
    begun = [*CHAT, {"role": "assistant", "content": "By bicycle"}]
    fields = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    assert choice(server, **fields)["message"]["content"]
    assert choice(server, **fields, tools=[WEATHER])["message"]["content"]
    jsonschema.validate(json.loads(choice(server, **fields, response_format=FORMAT)["message"]["content"]), SCHEMA)


def test_other_endpoints(server):
    fields = {"input": CHAT, "max_output_tokens": 80, "messages": None, "max_tokens": None, "thinking_token_budget": 5}
    format = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    output = post(server, "/v1/responses", text={"format": format}, **fields).json()["output"]
    jsonschema.validate(json.loads(output[-1]["content"][0]["text"]), SCHEMA)
    function = WEATHER["function"]
    tool = {"name": function["name"], "input_schema": function["parameters"]}
    fields = {"tools": [tool], "tool_choice": {"type": "any"}, "thinking": {"type": "enabled", "budget_tokens": 5}}
    message = post(server, "/v1/messages", **fields).json()
    assert message["stop_reason"] == "tool_use"
    jsonschema.validate(message["content"][-1]["input"], function["parameters"])


def test_histories_that_the_template_would_refuse(server):
    """Content and reasoning beside a call, several calls in a message, tools without a description."""
    function = {"name": "weather", "arguments": ARGUMENTS}
    calls = [{"id": f"call_{number}", "type": "function", "function": function} for number in (1, 2)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "warm"} for call in calls]
    said = {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls}
    tool = {"type": "function", "function": {"name": "weather"}}
    text = shown(server, [*CHAT, said, *results], tools=[tool])
    assert text.count("to=functions.weather") == 2
    assert "I look." in text
    assert "Hm." in text
    later = shown(server, [*CHAT, {"role": "system", "content": "Be brief."}, *CHAT])
    assert "Be brief." in later
    assert "warm" in shown(server, [*CHAT, results[0]])
    parameters = {"type": "object", "properties": {"days": {"enum": [1, 2], "default": 1}}}
    assert "days" in shown(server, CHAT, tools=[{**tool, "function": {"name": "weather", "parameters": parameters}}])


def shown(url, messages, **fields):
    """The chat as the template renders it."""
    response = httpx.post(url + "/tokenize", json={"messages": messages, **fields}, timeout=60)
    assert response.status_code == 200, response.text
    response = httpx.post(url + "/detokenize", json={"tokens": response.json()["tokens"]}, timeout=60)
    return response.json()["prompt"]


def test_calls_may_have_either_order_of_the_header(gpt_oss):
    grammars = Grammars(gpt_oss, len(gpt_oss), frozenset({2}))
    structure, arguments = required_calls(gpt_oss, [WEATHER], True), '{"town": "Rome", "year": 2001}'
    headers = [
        "<|channel|>commentary to=functions.get_sunshine <|constrain|>json<|message|>",
        " to=functions.get_sunshine<|channel|>commentary json<|message|>",
    ]
    for header in headers:
        assert accepts(grammars, gpt_oss, structure, header + arguments)
        assert not accepts(grammars, gpt_oss, structure, header.replace("sun", "moon") + arguments)
        assert not accepts(grammars, gpt_oss, structure, header + arguments.replace("Rome", "Paris"))
