"""/v1/messages, Anthropic's API: the reply is that of the chat completion, in Anthropic's form."""

import json

import httpx
import pytest

from tests.server.test_chat import CHAT, PRINCIPLE, create
from tests.server.test_fields import ALIGNED, WEATHER
from tests.serving import KEY

pytestmark = pytest.mark.slow

FIELDS = {"model": "smollm2", "max_tokens": 24, "temperature": 0}
TOOL = {
    "name": WEATHER["function"]["name"],
    "description": "Hours of sunshine a year",
    "input_schema": WEATHER["function"]["parameters"],
    "cache_control": {"type": "ephemeral"},
}
BILLING = "x-anthropic-billing-header: cc_version=2.1.37.fbe; cc_entrypoint=cli; cch={};"


def post(url, path="/v1/messages", headers=None, **fields):
    return httpx.post(url + path, json={**FIELDS, "messages": CHAT, **fields}, headers=headers, timeout=120)


def message(url, **fields):
    response = post(url, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(url, **fields):
    """The events of a stream, whose names are their types."""
    text = post(url, stream=True, **fields).text
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    parsed = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]
    assert all(name == data["type"] for name, data in parsed)
    return [data for _, data in parsed]


def gathered(events):
    """The message that a client puts together from events."""
    first, ping, *others, end, last = events
    assert [first["type"], ping["type"], end["type"], last["type"]] == [
        "message_start", "ping", "message_delta", "message_stop",
    ]  # fmt: skip
    whole, is_open = first["message"], False
    for event in others:
        assert event["index"] == len(whole["content"]) - (event["type"] != "content_block_start")
        assert is_open == (event["type"] != "content_block_start")
        if event["type"] == "content_block_start":
            whole["content"].append(event["content_block"])
            is_open, arguments = True, ""
        elif event["type"] == "content_block_stop":
            is_open, block = False, whole["content"][-1]
            if block["type"] == "tool_use":
                block["input"] = json.loads(arguments)
        elif event["delta"]["type"] == "input_json_delta":
            arguments += event["delta"]["partial_json"]
        else:
            kind = event["delta"]["type"].removesuffix("_delta")
            whole["content"][-1][kind] += event["delta"][kind]
    assert not is_open
    return {**whole, **end["delta"], "usage": end["usage"]}


def without_ids(message):
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    usage = {name: message["usage"][name] for name in ("output_tokens", "cache_creation_input_tokens")}
    return {**message, "id": "", "content": blocks, "usage": usage}


@pytest.mark.parametrize("extra", [{}, ALIGNED], ids=["plain", "aligned"])
def test_a_message_is_the_chat_completion(url, client, extra):
    system = "You are a mayor."
    expected = create(client, extra, messages=[{"role": "system", "content": system}, *CHAT])
    found = message(url, system=[{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}], **extra)
    assert found["content"] == [{"type": "text", "text": expected.choices[0].message.content}]
    assert (found["type"], found["role"], found["model"], found["stop_reason"]) == (
        "message", "assistant", "smollm2", "max_tokens",
    )  # fmt: skip
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected.usage.prompt_tokens
    assert usage["output_tokens"] == expected.usage.completion_tokens
    assert usage["alignment_details"]["branches"] == (2 if extra else 1)
    assert without_ids(gathered(events(url, system=system, **extra))) == without_ids(found)


def test_a_tool_loop_whole_and_streamed(url, client):
    fields = {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 100}
    found = message(url, **fields, **ALIGNED)
    (block,) = found["content"]
    assert (block["type"], block["name"], found["stop_reason"]) == ("tool_use", TOOL["name"], "tool_use")
    chat = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 100}
    (call,) = create(client, ALIGNED, **chat).choices[0].message.tool_calls
    assert block["input"] == json.loads(call.function.arguments)
    assert without_ids(gathered(events(url, **fields, **ALIGNED))) == without_ids(found)
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "2473 hours"}]}
    turns = [*CHAT, {"role": "assistant", "content": [block]}]
    second = message(url, messages=[*turns, {"role": "user", "content": [result, {"type": "text", "text": "So?"}]}])
    as_chat = [
        *CHAT,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call.id, "content": "2473 hours"},
        {"role": "user", "content": "So?"},
    ]
    assert second["content"][0]["text"] == create(client, messages=as_chat).choices[0].message.content
    named = {"type": "tool", "name": TOOL["name"]}
    assert message(url, tools=[TOOL], tool_choice=named, max_tokens=100)["content"][0]["name"] == TOOL["name"]
    assert message(url, tools=[TOOL], tool_choice={"type": "none"})["stop_reason"] == "max_tokens"


def test_a_call_that_was_cut_off_can_be_sent_back(url):
    fields = {"tools": [TOOL], "tool_choice": {"type": "any"}}
    cut = message(url, **fields, max_tokens=26)
    assert cut["stop_reason"] == "max_tokens"
    assert cut["content"][0]["input"] == {}
    results = [{"type": "tool_result", "tool_use_id": block["id"], "is_error": True} for block in cut["content"]]
    turns = [*CHAT, {"role": "assistant", "content": cut["content"]}, {"role": "user", "content": results}]
    assert message(url, messages=turns, **fields)


def test_stop_sequences_are_named(url):
    text = message(url)["content"][0]["text"]
    stop = text[6:9]
    found = message(url, stop_sequences=["§", stop])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)
    assert found["content"][0]["text"] == text[: text.index(stop)]
    brief = message(url, messages=[{"role": "user", "content": "Say yes."}], max_tokens=90)
    assert (brief["stop_reason"], brief["stop_sequence"]) == ("end_turn", None)


def test_the_last_message_of_the_assistant_is_continued(url, client):
    begun = [*CHAT, {"role": "assistant", "content": "From the wind, because"}]
    expected = create(client, {"continue_final_message": True}, messages=begun).choices[0].message.content
    assert message(url, messages=begun)["content"][0]["text"] == expected


def test_a_schema_is_followed(url):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    found = message(url, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(found["content"][0]["text"])["a"] in (1, 2)


def test_tokens_are_counted_like_prompts(url):
    for extra in ({}, {"principle": PRINCIPLE}, {"tools": [TOOL], "system": "Be brief."}):
        counted = post(url, "/v1/messages/count_tokens", **extra)
        usage = message(url, **extra)["usage"]
        assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_a_volatile_header_in_the_system_text_does_not_spoil_the_prefix_cache(url):
    def ask(number):
        system = [{"type": "text", "text": BILLING.format(number)}, {"type": "text", "text": "You are a mayor. " * 20}]
        response = post(url, system=system)
        assert response.headers["X-Linalign-Ignored"] == "system.x-anthropic-billing-header"
        return response.json()

    first, second = ask("a1b2c"), ask("f00ba")
    assert first["content"] == second["content"]
    assert second["usage"]["cache_read_input_tokens"] >= 64


def test_only_the_line_of_the_volatile_header_is_left_out(url, client):
    expected = create(client, messages=[{"role": "system", "content": "You are a mayor."}, *CHAT])
    text = BILLING.format("a1b2c") + "\n\nYou are a mayor."
    blocks = [{"type": "text", "text": part} for part in ("You are a mayor.", BILLING.format("a1b2c"))]
    in_messages = [{"role": "system", "content": text}, *CHAT]
    for fields in ({"system": text}, {"system": blocks}, {"messages": in_messages}):
        response = post(url, **fields)
        assert response.headers["X-Linalign-Ignored"] == "system.x-anthropic-billing-header"
        assert response.json()["content"][0]["text"] == expected.choices[0].message.content


CODE = {  # the parts of what Claude Code sends
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>\nToday is Monday.\n</system-reminder>\n"},
                {"type": "text", "text": "Say hello.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
            ],
        },
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello?"}]},
    ],
    "system": [
        {"type": "text", "text": BILLING.format("a1b2c")},
        {"type": "text", "text": "You are a coding agent.", "cache_control": {"type": "ephemeral"}},
    ],
    "tools": [{**TOOL, "eager_input_streaming": True}, {"type": "web_search_20250305", "name": "web_search"}],
    "metadata": {"user_id": '{"device_id":"1","session_id":"2"}'},
    "max_tokens": 32_000,
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "stop_sequences": ["e", "o", "a"],
    "stream": True,
}


def test_what_a_coding_agent_sends_is_served(url):
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219", "x-app": "cli"}
    response = post(url, "/v1/messages?beta=true", headers=headers, **CODE)
    assert response.status_code == 200, response.text
    ignored = set(response.headers["X-Linalign-Ignored"].split(", "))
    assert ignored >= {"metadata", "thinking", "context_management", "output_config.effort", "max_tokens"}
    assert ignored >= {"tools.web_search_20250305", "tools.eager_input_streaming", "messages.content.cache_control"}
    assert "message_stop" in response.text


@pytest.mark.parametrize(
    ("fields", "status", "kind", "param"),
    [
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"model": "x"}, 404, "not_found_error", "model"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error",
         "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": 3}]}]}, 400,
         "invalid_request_error", "messages.0.content.0.tool_use_id"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, 400, "invalid_request_error", "tools.0.name"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
        ({"system": "word " * 9000}, 400, "invalid_request_error", "messages"),
        ({"temprature": 1}, 400, "invalid_request_error", "temprature"),
        ({"n": 2}, 400, "invalid_request_error", "n"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, 400, "invalid_request_error",
         "output_config.format"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_have_anthropics_shape(url, fields, status, kind, param):
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        # Counting does not submit the request to the engine.
        if path.endswith("tokens") and fields.keys() & {"stop_sequences", "output_config", "system"}:
            continue
        response = post(url, path, **fields)
        body = response.json()
        assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
        assert body["error"]["param"] == param


def test_a_key_may_be_in_anthropics_header(closed):
    assert post(closed, headers={"x-api-key": KEY}).status_code == 200
    for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": KEY, "Authorization": "Bearer wrong"}):
        refused = post(closed, headers=headers)
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert httpx.get(closed + "/v1/models", headers={"x-api-key": KEY}).status_code == 200
