"""Conversations in which clients send back imperfect messages: the server accepts whatever it has sent itself."""

import httpx
import openai
import pytest
from pydantic import create_model

from tests.server.test_fields import WEATHER

pytestmark = pytest.mark.slow

ASK = {"role": "user", "content": "The weather in Rome? Use the tool."}
NAME = WEATHER["function"]["name"]
ON = {"role": "user", "content": "Go on."}
IMAGE = {"role": "user", "content": [{"type": "image_url"}]}
IMPOSSIBLE = {"type": "json_schema", "schema": {"not": {}}}
ARGUMENTS = ['{"city": "Par', "null", "[1, 2]", '{"a": 1, "a": 2}', "", "Rome", '"Rome"', '{"a": 1e999}', "{" * 500]


def chat(url, messages, **fields):
    body = {"model": "smollm2", "messages": messages, "max_tokens": 4, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def response(url, items, **fields):
    body = {"model": "smollm2", "input": items, "max_output_tokens": 4, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/responses", json=body, timeout=120)


def call(arguments):
    return {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


@pytest.mark.parametrize("arguments", [*ARGUMENTS, None, {"city": "Rome"}])
def test_any_arguments_of_a_call_are_accepted(url, arguments):
    messages = [ASK, {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}]
    messages += [{"role": "tool", "tool_call_id": "call_1", "content": "wrong arguments"}, ON]
    assert chat(url, messages).status_code == 200
    item = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": arguments}
    items = [ASK, item, {"type": "function_call_output", "call_id": "call_1", "output": "wrong arguments"}, ON]
    assert response(url, items).status_code == 200


def test_the_model_sees_the_arguments_as_they_are(url):
    def tokens(arguments):
        messages = [ASK, {"role": "assistant", "tool_calls": [call(arguments)]}, ON]
        ids = httpx.post(f"{url}/tokenize", json={"messages": messages}, timeout=60).json()["tokens"]
        return httpx.post(f"{url}/detokenize", json={"tokens": ids}, timeout=60).json()["prompt"]

    for arguments in ('{"city": "Par', '{"a": 1, "a": 2}', "[1, 2]"):
        assert f'{{"name": "get_weather", "arguments": {arguments}}}' in tokens(arguments)
    for arguments in ("null", "", "{}", None):
        assert '{"name": "get_weather", "arguments": {}}' in tokens(arguments)


def test_arguments_with_too_many_values_for_a_body_are_shown_as_text(url):
    arguments = "[" + "[]," * 50_001 + "[]]"
    messages = [ASK, {"role": "assistant", "tool_calls": [call(arguments)] * 2}, ON]
    assert chat(url, messages).json()["error"]["code"] == "context_length_exceeded"


EMPTY = [
    [ASK, {"role": "assistant", "content": None}, ON],
    [ASK, {"role": "assistant"}, ON],
    [ASK, {"role": "assistant", "content": [], "tool_calls": []}, ON],
    [ASK, {"role": "assistant", "content": "", "tool_calls": None, "refusal": None, "annotations": []}, ON],
    [ASK, {"role": "assistant", "tool_calls": [call("{}")]}, {"role": "tool", "tool_call_id": "call_1"}, ON],
    [ASK, {"role": "assistant", "tool_calls": [call("{}")]}, {"role": "tool", "content": []}, ON],
    [{"role": "system", "content": []}, {"role": "user", "content": []}],
    [ASK, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, {"role": "function", "name": "f"}],
    [ASK, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, ON],
    [ASK, {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm", "signature": "x"}]}, ON],
    [ASK, {"role": "assistant", "content": "x", "reasoning": "Hm", "reasoning_details": [{"text": "Hm"}]}, ON],
]


@pytest.mark.parametrize("messages", EMPTY)
def test_messages_without_content_are_accepted(url, messages):
    assert chat(url, messages).status_code == 200, chat(url, messages).text


@pytest.mark.parametrize(
    "items",
    [
        [ASK, {"role": "assistant", "content": []}, ON],
        [ASK, {"role": "assistant", "content": None}, ON],
        [ASK, {"type": "function_call", "call_id": "a", "name": "f", "arguments": [1]}, ON],
        [ASK, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}], "encrypted_content": "x"}, ON],
        [ASK, {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, ON],
        [ASK, {"type": "function_call_output", "call_id": "a", "output": None}, ON],
        [{"role": "user", "content": [{"type": "input_text", "text": "Hi", "prompt_cache_breakpoint": {}}]}],
    ],
)
def test_items_without_content_are_accepted(url, items):
    assert response(url, items).status_code == 200, response(url, items).text


@pytest.mark.parametrize("max_tokens", [1, 9, 14, 18, 40])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_reply_that_was_cut_anywhere_can_be_sent_back(url, max_tokens, legacy):
    fields = {"tools": [WEATHER], "tool_choice": "required"}
    if legacy:
        fields = {"functions": [WEATHER["function"]], "function_call": {"name": NAME}}
    reply = chat(url, [ASK], max_tokens=max_tokens, logprobs=True, **fields).json()["choices"][0]
    assert chat(url, [ASK, reply["message"], ON], **fields).status_code == 200
    tools = [{"type": "function", **WEATHER["function"]}]
    items = response(url, [ASK], max_output_tokens=max_tokens, tools=tools, tool_choice="required").json()["output"]
    assert response(url, [ASK, *items, ON]).status_code == 200


def test_functions_are_answered_in_their_own_form(client):
    fields = {"model": "smollm2", "messages": [ASK], "functions": [WEATHER["function"]], "temperature": 0}
    fields |= {"function_call": {"name": NAME}, "max_tokens": 60}
    (choice,) = client.chat.completions.create(**fields).choices
    as_tool = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    common = {name: value for name, value in fields.items() if not name.startswith("function")}
    (expected,) = client.chat.completions.create(**common, **as_tool).choices
    assert choice.finish_reason == "function_call"
    assert choice.message.tool_calls is None
    assert choice.message.function_call.arguments == expected.message.tool_calls[0].function.arguments
    streamed = list(client.chat.completions.create(**fields, stream=True))
    pieces = [chunk.choices[0].delta.function_call for chunk in streamed if chunk.choices[0].delta.function_call]
    assert pieces[0].name == NAME
    assert "".join(piece.arguments for piece in pieces) == choice.message.function_call.arguments
    assert streamed[-1].choices[0].finish_reason == "function_call"


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ("chat/completions", {"messages": [ASK, {"role": "tool", "content": 3}]}, "messages.1.content"),
        ("chat/completions", {"messages": [IMAGE]}, "messages.0.content.0.type"),
        ("chat/completions", {"messages": [ASK], "max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat/completions", {"messages": [ASK], "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ("responses", {"input": [{"type": "function_call", "call_id": "a", "name": 3}]}, "input.0.name"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ("responses", {"input": "a" * 400_000}, "input"),
        ("responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ("responses", {"input": "a", "text": {"format": IMPOSSIBLE}}, "text.format"),
        ("responses", {"input": "a", "tool_choice": "required"}, "tool_choice"),
        ("completions", {"prompt": "a", "max_tokens": -2}, "max_tokens"),
    ],
)  # fmt: skip
def test_errors_name_the_fields_of_the_client(url, endpoint, body, param):
    answer = httpx.post(f"{url}/v1/{endpoint}", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param, answer.text


def test_a_parsed_reply_of_the_sdk_can_be_sent_back(client):
    schema = {"type": "object", "properties": {"x": {"enum": ["a"]}}, "required": ["x"], "additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    fields = {"model": "smollm2", "max_tokens": 90, "temperature": 0, "response_format": format}
    tool = openai.pydantic_function_tool(create_model("f", x=(int, ...)))
    for more in ({}, {"tools": [tool], "parallel_tool_calls": False}):
        reply = client.chat.completions.parse(messages=[ASK], **fields, **more)
        message = reply.choices[0].message
        assert client.chat.completions.create(messages=[ASK, message, ON], **fields).choices
        assert client.chat.completions.create(messages=[ASK, message.model_dump(), ON], **fields).choices
