"""/v1/responses through OpenAI's SDK."""

import json

import httpx
import jsonschema
import openai
import pytest
from openai.types.responses import Response

from linalign.server.protocol.responses import ResponsesRequest
from tests.server.test_chat import CHAT, JSON, PRINCIPLE, create
from tests.server.test_fields import WEATHER, Plant

ALIGNED = {"principle": PRINCIPLE, "alignment_ratio": 2}
TOOL = {"type": "function", **WEATHER["function"]}


def respond(client, extra=None, **fields):
    all_fields = {"model": "smollm2", "input": CHAT[0]["content"], "temperature": 0, "max_output_tokens": 24, **fields}
    return client.responses.create(**all_fields, extra_body=extra or {})


def test_a_response_has_the_text_of_the_chat_completion(client):
    chat = create(client, ALIGNED).choices[0].message.content
    response = respond(client, ALIGNED)
    assert response.output_text == chat
    assert response.status == ("completed" if response.usage.output_tokens < 24 else "incomplete")
    assert response.usage.alignment_details["branches"] == 2
    assert response.store is False
    assert respond(client, ALIGNED, input=CHAT).output_text == chat
    parts = [{"role": "user", "content": [{"type": "input_text", "text": CHAT[0]["content"]}]}]
    assert respond(client, ALIGNED, input=parts).output_text == chat
    instructed = respond(client, ALIGNED, instructions="You are a mayor.")
    system = [{"role": "system", "content": "You are a mayor."}, *CHAT]
    assert instructed.output_text == create(client, ALIGNED, messages=system).choices[0].message.content
    assert respond(client, model="smollm2:teacher").usage.alignment_details["branches"] == 2
    short = respond(client, ALIGNED, max_output_tokens=3)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_events_match_the_sdks_types(client):
    whole = respond(client, ALIGNED, top_logprobs=2)
    events = list(respond(client, ALIGNED, stream=True, top_logprobs=2))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert last.usage == whole.usage.model_copy(
        update={
            "alignment_details": last.usage.alignment_details,
            "input_tokens_details": last.usage.input_tokens_details,
        }
    )
    tokens = [token.token for token in last.output[0].content[0].logprobs]
    assert "".join(tokens) == whole.output_text
    with client.responses.stream(model="smollm2", input="Say yes.", max_output_tokens=8) as stream:
        assert stream.until_done() is stream


def test_the_object_is_openais(url):
    body = {"model": "smollm2", "input": "Say yes.", "max_output_tokens": 4, **ALIGNED}
    Response.model_validate(httpx.post(url + "/v1/responses", json=body, timeout=60).json())


def test_structured_output(client):
    parsed = client.responses.parse(
        model="smollm2", input=CHAT, text_format=Plant, max_output_tokens=200, temperature=0, extra_body=ALIGNED
    )
    assert isinstance(parsed.output_parsed, Plant)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_loop(client, stream):
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 100}
    first = respond(client, ALIGNED, stream=stream, **fields)
    if stream:
        events = list(first)
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        first = events[-1].response
        assert "".join(deltas) == first.output[0].arguments
        assert len(deltas) > 1
    (call,) = first.output
    assert (call.type, call.name, first.status) == ("function_call", "get_sunshine", "completed")
    jsonschema.validate(json.loads(call.arguments), WEATHER["function"]["parameters"])
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2473 hours"}
    second = respond(client, ALIGNED, input=[*CHAT, call.model_dump(exclude_none=True), result], tools=[TOOL])
    assert second.output_text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous_response_id": "resp_1"}, "keeps no responses"),
        ({"input": [{"type": "image"}]}, "no item of this type"),
        ({"input": [{"type": "function_call", "call_id": "1", "namme": "x", "arguments": "{}"}]}, "did you mean name"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schemaa": {}}}}, "'schemaa'; did you mean schema"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "no such function"),
        ({"background": True}, "not supported"),
        ({"max_output_tokens": 0}, "greater"),
        ({"tool_choice": "required"}, "no such function"),
        ({"input": []}, "at least 1"),
    ],
    ids=str,
)
def test_invalid_requests_are_refused(client, change, message):
    with pytest.raises(openai.BadRequestError, match=message):
        respond(client, **change)


def test_errors_use_the_endpoints_field_names(url):
    body = {"model": "smollm2", "input": "Hi."}
    for change, param in [
        ({"reasoning": {"effort": "very"}}, "reasoning.effort"),
        ({"max_output_tokens": "x"}, "max_output_tokens"),
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a"),
    ]:
        content = json.dumps(body | change)
        response = httpx.post(url + "/v1/responses", content=content, headers=JSON, timeout=60)
        error = response.json()["error"]
        assert error["param"] == param
        assert not error["message"].startswith("Value error")


def test_output_items_are_accepted_as_input(client):
    """Output items as the SDK dumps them, empty fields included; a result in parts; reasoning without a message."""
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 100}
    call = respond(client, ALIGNED, **fields).output[0].model_dump()
    message = respond(client, ALIGNED).output[0].model_dump()
    result = {
        "type": "function_call_output",
        "call_id": call["call_id"],
        "output": [{"type": "input_text", "text": "7"}],
    }
    reasoning = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    assert respond(client, ALIGNED, input=[*CHAT, message, call, result, reasoning], tools=[TOOL]).output_text


def test_text_and_its_calls_are_one_message():
    items = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Let me see."},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "7"},
    ]
    messages = ResponsesRequest.model_validate({"model": "m", "input": items}).chat.messages
    assert [message.role for message in messages] == ["user", "assistant", "tool"]
    assert (messages[1].content, len(messages[1].tool_calls)) == ("Let me see.", 1)


@pytest.mark.parametrize("stream", [False, True])
def test_every_token_has_its_log_probability(client, stream):
    """Also a token that is only a part of a character."""
    text = "é漢🎉🦄"
    schema = {"type": "json_schema", "name": "x", "schema": {"const": text}}
    fields = {
        "text": {"format": schema},
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
        "stream": stream,
    }
    response = respond(client, ALIGNED, **fields)
    if stream:
        response = list(response)[-1].response
    tokens = response.output[0].content[0].logprobs
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == response.output_text == f'"{text}"'


@pytest.mark.parametrize(
    "metadata", [{f"k{i}": "v" for i in range(17)}, {"k" * 65: "v"}, {"k": "v" * 513}], ids=["many", "name", "value"]
)
def test_metadata_is_as_bounded_as_openais(url, metadata):
    """/v1/responses returns it with every event."""
    path, fields = "/v1/responses", {"input": "Hello"}
    refused = httpx.post(url + path, json={"model": "smollm2", "metadata": metadata, **fields})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith("metadata")
    most = {f"{i:064}": "v" * 512 for i in range(16)}
    largest = {"model": "smollm2", "metadata": most, "temperature": 0, **fields}
    accepted = httpx.post(url + path, json=largest, timeout=60)
    assert accepted.status_code == 200
