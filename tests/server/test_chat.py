"""/v1/chat/completions of a real server process with the embedded model, through real clients."""

import itertools
import json
import subprocess
import time

import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from linalign import Principle, SamplingParams, Usage
from linalign.server.replies.objects import usage_object
from tests.engines import make_engine, run_all

CHAT = [{"role": "user", "content": "Where should our town get its power from?"}]
JSON = {"Content-Type": "application/json"}
PRINCIPLE = "Answer in favour of solar power."


def create(client, extra=None, **fields):
    all_fields = {"model": "smollm2", "messages": CHAT, "temperature": 0, "max_tokens": 24, **fields}
    return client.chat.completions.create(**all_fields, extra_body=extra or {})


def test_an_aligned_reply_is_the_engines(client, embedded):
    engine = make_engine(embedded, num_pages=200)
    prompt = engine.prompts.build(CHAT, [Principle(PRINCIPLE, ratio=2.0)])
    (outputs,) = run_all(engine, [(prompt, SamplingParams(temperature=0, max_tokens=24))])
    reply = create(client, {"principle": PRINCIPLE, "alignment_ratio": 2})
    assert reply.choices[0].message.content == "".join(output.text for output in outputs)
    assert reply.choices[0].finish_reason == outputs[-1].finish_reason
    assert reply.usage.prompt_tokens == len(prompt.principled[0])
    assert reply.usage.completion_tokens == outputs[-1].usage.completion_tokens
    assert reply.usage.alignment_details["branches"] == 2
    plain = create(client)
    assert plain.usage.alignment_details["branches"] == 1
    assert plain.choices[0].message.content != reply.choices[0].message.content


def test_the_objects_are_openais(url):
    body = {"model": "smollm2", "messages": CHAT, "max_tokens": 4, "principle": PRINCIPLE}
    whole = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()
    ChatCompletion.model_validate(whole, strict=True)
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", url + "/v1/chat/completions", json=streamed, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [ChatCompletionChunk.model_validate(json.loads(line[6:]), strict=True) for line in lines[:-1]]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("length", "stop")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_call_that_is_cut_off_in_its_name_is_left_out_whole_and_streamed(client):
    function = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}
    fields = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    for max_tokens in (1, 3, 5):
        whole = create(client, max_tokens=max_tokens, **fields).choices[0]
        chunks = list(create(client, max_tokens=max_tokens, stream=True, **fields))
        assert whole.finish_reason == "length"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert whole.message.content == ""
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""


def test_a_stream_is_the_same_text_token_by_token(client):
    extra = {"principle": PRINCIPLE, "alignment_ratio": 0.5}
    whole = create(client, extra)
    started = time.perf_counter()
    arrivals, texts = [], []
    for chunk in create(client, extra, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            arrivals.append(time.perf_counter() - started)
            texts.append(chunk.choices[0].delta.content)
    assert "".join(texts) == whole.choices[0].message.content
    assert len(texts) >= whole.usage.completion_tokens - 1  # all but the end-of-sequence token have text
    assert len(set(arrivals)) == len(arrivals)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_reply_and_is_not_part_of_it(client, stream):
    text = create(client).choices[0].message.content
    stop = text[10:16]
    reply = create(client, stop=[stop], stream=stream)
    if stream:
        chunks = list(reply)
        got = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        got, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert got == text[: text.index(stop)]
    assert reason == "stop"


def test_seeds_and_settings(client):
    one, again, other = (
        create(client, {"top_k": 40, "min_p": 0.01}, temperature=1.2, top_p=0.95, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_several_principles_and_placement(client):
    extra = {"principle": [{"text": PRINCIPLE, "weight": 2}, {"text": "Be brief.", "ratio": 1}]}
    assert create(client, extra, max_tokens=2).usage.alignment_details["branches"] == 3
    placed = create(client, {"principle": PRINCIPLE, "principle_placement": "user"}, max_tokens=2)
    assert placed.usage.alignment_details["prefix_cached_tokens"] >= 32  # the branches share the common prefix


def test_models_and_version(client, url):
    assert client.models.list().data[0].id == "smollm2"
    assert client.models.retrieve("smollm2").id == "smollm2"
    assert httpx.get(url + "/version").json() == {"version": "0.1.0"}


def test_curl(url):
    body = json.dumps({"model": "smollm2", "messages": CHAT, "max_tokens": 3, "principle": PRINCIPLE})
    command = ["curl", "-s", url + "/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    reply = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert reply["choices"][0]["message"]["content"]


BASE = {"model": "smollm2", "messages": CHAT, "max_tokens": 1}
BAD = [
    ({"model": "gpt-5"}, 404, "model", "does not exist"),
    ({"messages": []}, 400, "messages", "at least 1"),
    ({"messages": [{"role": "boss", "content": "x"}]}, 400, "messages.0.role", "system"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content", "string"),
    ({"alignment_ration": 2}, 400, "alignment_ration", "alignment_ratio"),
    ({"principal": "x"}, 400, "principal", "principle"),
    ({"stream": True, "stream_options": {"include_usge": True}}, 400, "stream_options.include_usge", "include_usage"),
    ({"principle": [{"text": "x", "wieght": 1}]}, 400, "principle.0.wieght", "weight"),
    ({"principle": ""}, 400, "principle", "empty"),
    ({"alignment_ratio": 20.1}, 400, "alignment_ratio", "20"),
    ({"alignment_ratio": -11}, 400, "alignment_ratio", "-10"),
    ({"alignment_ratio": "2"}, 400, "alignment_ratio", "number"),
    ({"alignment_top_p": 0}, 400, "alignment_top_p", "greater"),
    ({"temperature": float("nan")}, 400, "temperature", "finite"),
    ({"temperature": float("inf")}, 400, "temperature", "finite"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "integer"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "messages", "context"),
    ({"principle": "word " * 9000}, 400, "messages", "with the principle"),
    ({"messages": [{"role": "user", "content": "a\ud800b"}]}, 400, "messages.0.content", "Unicode"),
    ({"principle": "\udfff"}, 400, "principle", "Unicode"),
    ({"principle": []}, 400, "principle", "at least 1"),
    ({"principle": [{"text": "a", "weight": 1e308}, {"text": "b", "weight": 1e308}]}, 400, "principle", "too large"),
    ({"stop": ["a"] * 17}, 400, "stop", "at most 16"),
    ({"stop": [""]}, 400, "stop", "empty"),
    ({"stop": [1]}, 400, "stop.0", "string"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        400,
        "tools.0.function",
        "object",
    ),
    ({"add_generation_prompt": False}, 400, "add_generation_prompt", "opposite"),
    ({"chat_template_kwargs": {"messages": "x"}}, 400, "chat_template_kwargs.messages", "template"),
    ({"metadata": {"a": "\ud800"}}, 400, "metadata.a", "surrogate"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"title": "\ud800"}}}]},
        400,
        "tools.0.function.parameters.title",
        "surrogate",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"default": float("nan")}}}]},
        400,
        "tools.0.function.parameters.default",
        "finite",
    ),
    ({"prompt": "x"}, 400, "prompt", "no such field"),
    ({"max_completion_tokens": 2}, 400, "max_tokens", "mean the same"),
    ({"alignment-ratio": 2}, 400, "alignment-ratio", "alignment_ratio"),
    ({"messages": [{"role": "user", "content": "x", "con-tent": 1}]}, 400, "messages.0.con-tent", "'con-tent'"),
    ({"principle": [{"text": "x"}] * 17}, 400, "principle", "at most 16"),
    ({"messages": [{"role": "user", "content": "word " * 400_000}]}, 400, "messages", "context"),
    ({"n": 0}, 400, "n", "greater"),
    ({"n": 100}, 400, "n", "64"),
    ({"n": 33, "principle": "x"}, 400, "n", "branches"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "20"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias.x", "pattern"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias.5", "100"),
    ({"logit_bias": {"99999999": 1}}, 400, "logit_bias", "no token"),
    ({"presence_penalty": 2.1}, 400, "presence_penalty", "2"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "greater"),
    ({"min_tokens": 2}, 400, "min_tokens", "max_tokens"),
    ({"stop_token_ids": [10**9]}, 400, "stop_token_ids", "no token"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "required"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        400,
        "structured_outputs",
        "exclude",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        400,
        "response_format",
        "not",
    ),
    ({"structured_outputs": {}}, 400, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a("}}, 400, "structured_outputs", "regex"),
    ({"structured_outputs": {"regx": "a"}}, 400, "structured_outputs.regx", "did you mean regex?"),
    ({"structured_outputs": {"json": "{"}}, 400, "structured_outputs", "not valid JSON"),
    ({"tools": [{"type": "function"}]}, 400, "tools.0.function", "required"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools.0.function.name", "pattern"),
    ({"tool_choice": "required"}, 400, "tool_choice", "no such function"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "tool_choice", "no such function"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages.0.content.0.type",
        "text",
    ),
    ({"continue_final_message": True}, 400, "continue_final_message", "assistant"),
    ({"modalities": ["audio"]}, 400, "modalities", "not supported"),
    ({"principle": [{"text": "a", "weight": 0}]}, 400, "principle", "weight above 0"),
    ({"alignment_method": "x"}, 400, "alignment_method", "linear"),
]


@pytest.mark.parametrize(("change", "status", "param", "words"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_refused_in_openais_shape(url, change, status, param, words, stream):
    body = json.dumps({**BASE, **({"stream": True} if stream else {}), **change})
    response = httpx.post(url + "/v1/chat/completions", content=body, headers=JSON, timeout=60)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("body", ["{", "[]", "5", "", '"x"', "null"])
def test_invalid_json(url, body):
    response = httpx.post(url + "/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/v1/chat/completions", 405)])
def test_unknown_routes_are_404(url, method, path, status):
    response = httpx.request(method, url + path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


EXTREMES = [
    {"alignment_temperature": 1e-300},
    {"alignment_temperature": 1e300},
    {"temperature": 1e-300},
    {"temperature": 1e-40},
    {"temperature": 1, "top_p": 1e-300},
    {"temperature": 1, "top_p": 1e-30, "min_p": 1, "top_k": 1},
    {"temperature": 1, "top_k": 2**70},
    {"alignment_top_p": 1e-45},
    {"alignment_top_p": 1 - 1e-10},
    {"alignment_ratio": 20},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"messages": [{"role": "user", "content": ""}]},
    {"principle": [{"text": "a", "weight": 1e-320}, {"text": "b", "weight": 1e-320}]},
    {"principle": [{"text": "a"}] * 16},
    {"principle": [{"text": "be brief"}, {"text": "be nice"}], "max_tokens": None, "stop": ["e", "a", "o", "i"]},
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
def test_extremes_are_served(url, extreme):
    for principle in ({}, {"principle": PRINCIPLE}):
        response = httpx.post(url + "/v1/chat/completions", json={**BASE, **principle, **extreme}, timeout=60)
        assert response.status_code == 200, response.text


def test_neutral_values_of_unsupported_fields_are_accepted(url):
    neutral = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "tools": None,
        "logit_bias": {},
    }
    assert httpx.post(url + "/v1/chat/completions", json={**BASE, **neutral}, timeout=60).status_code == 200


def test_a_dead_engine_shows_in_health_and_errors(own_server, monkeypatch):
    url, engine = own_server
    assert httpx.get(url + "/health").status_code == 200
    monkeypatch.setattr(engine.runner, "forward", lambda _: 1 / 0)
    for _ in range(2):
        assert httpx.post(url + "/v1/chat/completions", json=BASE, timeout=60).status_code == 503
    response = httpx.get(url + "/health")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"


def test_cached_tokens_do_not_depend_on_which_choice_ends_first():
    """The choice that runs first computes the prompt; the others reuse it."""
    usages = [Usage(30, cached, 5, 1, 30 - cached, 0, cached) for cached in (8, 24, 16)]
    objects = [usage_object(order, None) for order in itertools.permutations(usages)]
    assert objects == [objects[0]] * 6
    assert objects[0]["prompt_tokens_details"] == {"cached_tokens": 8}


def test_a_text_that_ends_like_the_beginning_of_a_call_is_whole(client, tokenizer):
    """The parser holds "<" until the end of the reply."""
    (yes,) = tokenizer.encode("yes", add_special_tokens=False)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    fields = {"tools": [tool], "logit_bias": {str(yes): 100}}
    structure = {"structured_outputs": {"regex": "yes <"}}
    assert create(client, structure, **fields).choices[0].message.content == "yes <"
    chunks = [chunk.choices[0] for chunk in create(client, structure, stream=True, **fields)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "yes <"
    assert chunks[-1].finish_reason == "stop"
