"""Requests that real clients send: client_cases.json has each with what is right."""

import json
from pathlib import Path

import httpx
import jsonschema
import pytest

pytestmark = pytest.mark.slow

CASES = json.loads((Path(__file__).parent / "client_cases.json").read_text())
IGNORED = {
    "parsed_replay": "messages.parsed",
    "prompt_cache_key": "prompt_cache_key",
    "responses_prompt_cache_key": "prompt_cache_key",
    "cache_control_part": "messages.content.cache_control",
    "max_tokens_beyond_context": "max_tokens",
    "reasoning_effort": "reasoning_effort",
    "safety_identifier": "safety_identifier",
    "tools_required_and_response_format": "response_format",
}


def send(url, name, **changes):
    response = httpx.post(url + CASES[name]["path"], json={**CASES[name]["body"], **changes}, timeout=120)
    assert response.status_code == 200, response.text
    return response


def choice(url, name, **changes):
    (choice,) = send(url, name, **changes).json()["choices"]
    return choice


@pytest.mark.parametrize("name", CASES)
def test_the_request_is_served(url, name):
    assert send(url, name).headers.get("X-Linalign-Ignored") == IGNORED.get(name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("top_p_0", {"top_p": 1, "temperature": 0}),
        ("max_tokens_16.0", {"max_tokens": 16}),
        ("max_tokens_-1", {"max_tokens": None}),
        ("max_tokens_beyond_context", {"max_tokens": None}),
        ("both_max", {"max_tokens": None}),
        ("model_missing", {"model": "smollm2", "temperature": 0}),
    ],
)
def test_the_reply_is_that_of_the_request_in_plain_words(url, name, change):
    at_once = {"temperature": 0} if name != "top_p_0" else {"temperature": 1.5}
    assert choice(url, name, **at_once)["message"] == choice(url, name, **change)["message"]


def call_of(choice):
    (call,) = choice["message"]["tool_calls"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def test_a_text_beside_tools_keeps_to_the_schema_and_calls_stay_possible(url):
    name = "tools_and_response_format"
    schema = CASES[name]["body"]["response_format"]["json_schema"]["schema"]
    text = 'Reply with the JSON {"x": "hi"} and do not call a function.'
    seen = set()
    for messages in ([{"role": "user", "content": text}], [{"role": "user", "content": "The weather in Rome?"}]):
        for bias in ({}, {"44": -100}):  # "<", with which a call begins
            reply = choice(url, name, messages=messages, max_tokens=60, logit_bias=bias, parallel_tool_calls=False)
            if reply["finish_reason"] == "tool_calls":
                assert call_of(reply)[0] == "get_weather"
                seen.add("call")
            else:
                jsonschema.validate(json.loads(reply["message"]["content"]), schema)
                seen.add("text")
    assert seen == {"call", "text"}


def test_a_required_call_is_preferred_to_a_format(url):
    reply = choice(url, "tools_required_and_response_format", max_tokens=60, parallel_tool_calls=False)
    assert reply["finish_reason"] == "tool_calls"
    assert list(call_of(reply)[1]) == ["city"]


def test_a_stop_string_does_not_cut_a_call(url):
    reply = choice(url, "stop_within_call", parallel_tool_calls=False)
    assert reply["finish_reason"] == "tool_calls"
    assert list(call_of(reply)[1]) == ["city"]


def test_a_call_that_has_only_begun_is_not_shown(url):
    reply = choice(url, "truncated_name")
    assert reply["message"]["content"] == ""
    assert reply["finish_reason"] == "length"


def test_what_a_tool_that_is_not_strict_cannot_enforce_is_left_out(url):
    for name in ("required_nonstrict_lookahead", "propertyNames"):
        reply = choice(url, name, max_tokens=100)
        assert reply["finish_reason"] in ("tool_calls", "length")
        assert reply["message"].get("tool_calls") or reply["finish_reason"] == "length"


def test_a_strict_tool_names_what_cannot_be_enforced(url):
    case = json.loads(json.dumps(CASES["required_nonstrict_lookahead"]))
    case["body"]["tools"][0]["function"]["strict"] = True
    for choice_of_tool in ("auto", "required"):
        response = httpx.post(url + case["path"], json={**case["body"], "tool_choice": choice_of_tool}, timeout=60)
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["param"] == "tools"
        assert "look-ahead" in error["message"]
        assert "call_0" not in error["message"]  # a rule of our grammar
        assert "start:" not in error["message"]


def test_what_codex_sends_is_served(url):
    """codex_request.json is what Codex CLI 0.171.0 sends, with texts shortened. Codex can set headers."""
    body = json.loads((Path(__file__).parent / "codex_request.json").read_text())
    headers = {"X-Linalign-Principle": "Answer%20in%20one%20word."}
    body |= {"max_output_tokens": 12, "temperature": 0}
    response = httpx.post(url + "/v1/responses", json=body, headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    assert set(response.headers["X-Linalign-Ignored"].split(", ")) == {
        "client_metadata",
        "include.reasoning.encrypted_content",
        "prompt_cache_key",
        "reasoning.summary",
        "tools.namespace",
        "tools.web_search",
    }
    events = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: ")]
    last = events[-1]["response"]
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert last["usage"]["alignment_details"]["principle_from"] == "headers"
    assert {tool["type"] for tool in last["tools"]} == {"function"}
    # Codex sends the items of a reply back with the next turn.
    again = {**body, "input": [*body["input"], *last["output"], body["input"][-1]]}
    assert httpx.post(url + "/v1/responses", json=again, timeout=120).status_code == 200
