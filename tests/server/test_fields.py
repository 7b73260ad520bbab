"""OpenAI's fields with a principle, through OpenAI's SDK, on a real server process with the embedded model."""

import json
import math

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel

from linalign import Principle, SamplingParams
from linalign.alignment_core.methods import METHODS
from tests.engines import make_engine, run_all
from tests.server.test_chat import CHAT, PRINCIPLE, create

pytestmark = pytest.mark.slow

ALIGNED = {"principle": PRINCIPLE, "alignment_ratio": 2}


def streamed(client, extra=None, **fields):
    """Collect a stream: the text, the finish reason and the log-probabilities of each choice."""
    texts, reasons, logprobs = {}, {}, {}
    for chunk in create(client, extra, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            if choice.logprobs:
                logprobs.setdefault(choice.index, []).extend(choice.logprobs.content)
    return texts, reasons, logprobs


@pytest.mark.parametrize("extra", [{}, ALIGNED], ids=["plain", "aligned"])
def test_choices(client, extra):
    extra = {**extra, "ignore_eos": True}
    fields = {"n": 3, "temperature": 1.0, "seed": 4, "logprobs": True, "top_logprobs": 2}
    whole = create(client, extra, **fields)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert whole.usage.prompt_tokens == create(client, extra, max_tokens=1).usage.prompt_tokens
    assert whole.usage.completion_tokens == 3 * 24
    texts, reasons, logprobs = streamed(client, extra, **fields)
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        assert [t.token for t in logprobs[choice.index]] == [t.token for t in choice.logprobs.content]
    assert whole.choices[0].message.content == create(client, extra, **{**fields, "n": 1}).choices[0].message.content
    assert whole.system_fingerprint == create(client, extra).system_fingerprint


def test_logprobs_spell_the_text_and_are_the_engines(client, embedded):
    reply = create(client, ALIGNED, logprobs=True, top_logprobs=5)
    content = reply.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode() == reply.choices[0].message.content
    engine = make_engine(embedded, num_pages=200)
    prompt = engine.prompts.build(CHAT, [Principle(PRINCIPLE, ratio=2.0)])
    (outputs,) = run_all(engine, [(prompt, SamplingParams(temperature=0, max_tokens=24, logprobs=5))])
    reports = [report for output in outputs for report in output.logprobs]
    assert [t.logprob for t in content] == pytest.approx([report.logprob for report in reports], abs=1e-4)
    for token in content:
        assert token.top_logprobs[0].token == token.token  # greedy
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001
    assert any(len(t.top_logprobs) < 5 for t in content)  # tokens outside the plausible set are not listed


def test_biases_and_penalties(client, embedded):
    word = embedded.tokenizer.encode(" banana", add_special_tokens=False)[0]
    text = create(client, ALIGNED, logit_bias={str(word): 100}, max_tokens=5).choices[0].message.content
    assert text == embedded.tokenizer.decode([word] * 5)
    endless = {**ALIGNED, "ignore_eos": True}
    free, penalised = (
        create(client, endless, max_tokens=40, frequency_penalty=penalty).choices[0].message.content
        for penalty in (0, 2)
    )
    assert len(set(penalised.split())) / len(penalised.split()) > len(set(free.split())) / len(free.split())
    assert create(client, {**endless, "repetition_penalty": 1.5}, max_tokens=40).choices[0].message.content != free


def test_ends(client, embedded):
    eos = embedded.tokenizer.convert_ids_to_tokens(embedded.tokenizer.eos_token_id)
    brief = {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 90}
    free = create(client, ALIGNED, **brief)
    assert free.choices[0].finish_reason == "stop"
    least = free.usage.completion_tokens + 10
    longer = create(client, {**ALIGNED, "min_tokens": least}, **brief)
    assert longer.usage.completion_tokens >= least
    endless = create(client, {**ALIGNED, "ignore_eos": True}, **brief)
    assert (endless.usage.completion_tokens, endless.choices[0].finish_reason) == (90, "length")
    assert eos not in endless.choices[0].message.content
    second = embedded.tokenizer.encode(free.choices[0].message.content)[1]
    cut = create(client, {**ALIGNED, "stop_token_ids": [second]}, **brief)
    assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (2, "stop")


def test_usage_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        create(client, ALIGNED, stream=True, stream_options=options, n=2, max_tokens=6, temperature=1, seed=1)
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {chunks[-1].usage.prompt_tokens}
    plain = list(create(client, ALIGNED, stream=True, stream_options={"include_usage": True}, max_tokens=3))
    assert [chunk.usage is None for chunk in plain] == [True] * (len(plain) - 1) + [False]


def test_content_in_parts_and_a_continued_reply(client):
    parts = [{"type": "text", "text": "Where should our town"}, {"type": "text", "text": "get its power from?"}]
    joined = [{"role": "user", "content": "Where should our town\nget its power from?"}]
    in_parts = [{"role": "user", "content": parts}]
    assert (
        create(client, ALIGNED, messages=in_parts).choices[0].message.content
        == create(client, ALIGNED, messages=joined).choices[0].message.content
    )
    begun = [*CHAT, {"role": "assistant", "content": "From the wind, because"}]
    more = create(client, {**ALIGNED, "continue_final_message": True}, messages=begun)
    whole = create(client, {**ALIGNED}, messages=begun)
    assert more.usage.prompt_tokens < whole.usage.prompt_tokens
    assert more.choices[0].message.content != whole.choices[0].message.content


class Plant(BaseModel):
    kind: str
    megawatts: int


@pytest.mark.parametrize("extra", [{}, ALIGNED], ids=["plain", "aligned"])
def test_structured_output(client, extra):
    parsed = client.chat.completions.parse(
        model="smollm2", messages=CHAT, response_format=Plant, temperature=0, max_tokens=200, extra_body=extra
    )
    assert parsed.choices[0].finish_reason == "stop"
    assert isinstance(parsed.choices[0].message.parsed, Plant)
    anything = create(client, extra, response_format={"type": "json_object"}, max_tokens=300)
    if anything.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(anything.choices[0].message.content), dict)
    chosen = create(client, {**extra, "structured_outputs": {"choice": ["coal", "gas", "the sun"]}})
    assert chosen.choices[0].message.content in ("coal", "gas", "the sun")
    matched = create(client, {**extra, "structured_outputs": {"regex": "[0-9]{2,4} MW"}})
    assert matched.choices[0].message.content.endswith(" MW")
    grammar = 'root ::= ("wind" | "sun") " and " ("water" | "waves")'
    text, _, _ = streamed(client, {**extra, "structured_outputs": {"grammar": grammar}})
    assert text[0].split(" and ")[1] in ("water", "waves")


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_sunshine",
        "description": "Hours of sunshine a year",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"enum": ["Rome", "Oslo"]},
                "year": {"type": "integer", "minimum": 1990, "maximum": 2030},
            },
            "required": ["town", "year"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_sunshine"}}], ids=str)
def test_a_tool_loop(client, choice):
    first = create(
        client, ALIGNED, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=100
    ).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert call.function.name == "get_sunshine"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    messages = [*CHAT, first.message, {"role": "tool", "tool_call_id": call.id, "content": "2473 hours"}]
    second = create(client, ALIGNED, messages=messages, tools=[WEATHER], max_tokens=20).choices[0]
    assert second.message.content

    arguments, reasons = "", []
    for chunk in create(
        client, ALIGNED, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=100, stream=True
    ):
        for piece in chunk.choices[0].delta.tool_calls or ():
            arguments += piece.function.arguments
        reasons.append(chunk.choices[0].finish_reason)
    assert arguments == call.function.arguments
    assert reasons[-1] == "tool_calls"


def test_strict_tools_allow_any_text(client):
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    free = create(client, ALIGNED, tools=[WEATHER], max_tokens=40).choices[0].message
    kept = create(client, ALIGNED, tools=[strict], max_tokens=40).choices[0].message
    assert kept.content == free.content != ""


def test_a_tool_without_parameters_has_empty_arguments(client):
    tool = {"type": "function", "function": {"name": "stop_all"}}
    reply = create(client, ALIGNED, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=60)
    (call,) = reply.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("stop_all", {})


def test_a_call_that_is_cut_off_in_its_arguments_says_length(client):
    reply = create(client, ALIGNED, tools=[WEATHER], tool_choice="required", max_tokens=30).choices[0]
    assert reply.finish_reason == "length"
    (call,) = reply.message.tool_calls
    assert call.function.name == WEATHER["function"]["name"]
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.function.arguments)


@pytest.mark.parametrize("stream", [False, True])
def test_a_structure_beyond_the_limits_affects_only_its_request(client, stream):
    """A limit that the grammar library hits while decoding fails that request. A choice of thousands stays below it."""
    many = {"structured_outputs": {"choice": [str(number) for number in range(5000)]}}
    assert 0 <= int(create(client, {**ALIGNED, **many}).choices[0].message.content) < 5000
    bomb = {"structured_outputs": {"regex": "(a{1000}){1000}"}}
    with pytest.raises(openai.APIError, match="structured_outputs can't be used"):
        list(create(client, {**ALIGNED, **bomb}, stream=stream, max_tokens=1000))
    assert create(client, ALIGNED, max_tokens=2).choices[0].message.content


@pytest.mark.parametrize("method", METHODS)
def test_methods(client, embedded, method):
    """Any request may choose a method, and may use negative ratios."""
    engine = make_engine(embedded, num_pages=200)
    for ratio in (1.5, -3):
        prompt = engine.prompts.build(CHAT, [Principle(PRINCIPLE, ratio=ratio)], method=method)
        (outputs,) = run_all(engine, [(prompt, SamplingParams(temperature=0, max_tokens=10))])
        extra = {"principle": PRINCIPLE, "alignment_ratio": ratio, "alignment_method": method}
        reply = create(client, extra, max_tokens=10).choices[0].message.content
        assert reply == "".join(output.text for output in outputs)


@pytest.mark.parametrize("stream", [False, True])
def test_a_trace_has_every_token(client, stream):
    traced = {**ALIGNED, "alignment_trace": True}
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 6, "n": 2, "temperature": 1, "seed": 1}
    steps = {0: [], 1: []}
    reply = create(client, traced, stream=stream, **fields)
    texts, logprobs = {0: "", 1: ""}, {0: [], 1: []}
    for part in reply if stream else [reply]:
        for choice in part.choices:
            steps[choice.index] += choice.alignment
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
    for index, of_choice in steps.items():
        assert b"".join(bytes(step["bytes"]) for step in of_choice).decode() == texts[index]
        assert [step["logprob"] for step in of_choice] == [token.logprob for token in logprobs[index]]
        for step in of_choice:
            assert step["kl"] > 0
            assert step["plausible_tokens"] >= len(step["top"]["aligned"]) > 0
            assert max(step["principled_logprob"], step["base_logprob"]) < 0
            assert [len(step["top"][policy]) for policy in ("principled", "base")] == [2, 2]
    (alone,) = create(client, {"alignment_trace": True}, max_tokens=1).choices
    (step,) = alone.alignment
    assert alone.logprobs is None
    assert (step["logprob"], step["base_logprob"], step["kl"]) == (step["principled_logprob"], None, None)


def test_the_mark_of_a_continued_message(client):
    """vLLM's clients send both fields."""
    begun = [*CHAT, {"role": "assistant", "content": "From the wind, because"}]
    one, both = (
        create(client, {**ALIGNED, "continue_final_message": True, **more}, messages=begun, max_tokens=5)
        for more in ({}, {"add_generation_prompt": False})
    )
    assert one.choices[0].message.content == both.choices[0].message.content


def test_lines_of_events_end_like_openais(url):
    body = {"model": "smollm2", "messages": CHAT, "max_tokens": 2, "stream": True}
    content = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).content
    assert content.endswith(b"\n\ndata: [DONE]\n\n")
    assert b"\r" not in content


def test_the_model_sees_tools_unless_tool_choice_is_none(client):
    with_tools, with_choice_none, without_tools = (
        create(client, ALIGNED, max_tokens=1, **fields).usage.prompt_tokens
        for fields in ({"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "none"}, {})
    )
    assert with_tools > with_choice_none == without_tools


def test_openapi_knows_the_fields(url):
    schema = httpx.get(url + "/openapi.json").json()["components"]["schemas"]["ChatCompletionRequest"]
    assert {"principle", "tools", "logit_bias"} <= set(schema["properties"])
    assert schema["additionalProperties"] is True  # fields of other servers are ignored
