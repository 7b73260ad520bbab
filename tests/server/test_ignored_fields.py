"""Fields without an effect: accepted and named in a header, unless they look like ours or --strict-fields is given."""

import time

import httpx
import pytest

from linalign.server.protocol.ignored_fields import MAX_HEADER, header_of, similar_name
from tests.serving import serving

pytestmark = pytest.mark.slow

CHAT = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 6, "temperature": 0}
TEXT = {"prompt": "Say hello.", "max_tokens": 6, "temperature": 0}
RESPONSE = {"input": "Say hello.", "max_output_tokens": 6, "temperature": 0}
BODIES = {"chat/completions": CHAT, "completions": TEXT, "responses": RESPONSE}
WITH_PARTS = [{"role": "user", "content": [{"type": "text", "text": "Say hello.", "cache_control": {"type": "x"}}]}]
WEB_SEARCH = [{"type": "web_search"}, {"type": "custom", "name": "apply_patch"}]


@pytest.fixture(scope="module")
def strict(embedded):  # noqa: ARG001 - loads the model first, so that the server finds the converted copy
    with serving("--strict-fields") as (url, _):
        yield url


def post(url, endpoint, fields):
    return httpx.post(f"{url}/v1/{endpoint}", json={"model": "smollm2", **BODIES[endpoint], **fields}, timeout=120)


def text_of(endpoint, response):
    assert response.status_code == 200, response.text
    body = response.json()
    if endpoint == "responses":
        return [part["text"] for item in body["output"] for part in item["content"]]
    return [choice["text"] if endpoint == "completions" else choice["message"] for choice in body["choices"]]


IGNORED = [
    ("chat/completions", {"prompt_cache_key": "a", "prompt_cache_retention": "24h"}, 2),
    ("chat/completions", {"safety_identifier": "a", "service_tier": "priority", "store": True, "verbosity": "low"}, 4),
    ("chat/completions", {"metadata": {"a": {"b": 1}}, "user": "me"}, 2),
    ("chat/completions", {"reasoning_effort": "high"}, 1),
    ("chat/completions", {"prediction": {"type": "content", "content": "x"}}, 1),
    ("chat/completions", {"stream_options": {"include_usage": True}}, 1),
    ("chat/completions", {"thinking": {"type": "enabled"}, "enable_thinking": True, "provider": {"order": ["a"]}}, 3),
    ("chat/completions", {"messages": WITH_PARTS}, "messages.content.cache_control"),
    ("chat/completions", {"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking"),
    ("chat/completions", {"tools": WEB_SEARCH}, "tools.web_search, tools.custom"),
    ("completions", {"user": "me", "store": True, "service_tier": "flex"}, 3),
    ("responses", {"include": ["reasoning.encrypted_content"]}, "include.reasoning.encrypted_content"),
    ("responses", {"reasoning": {"summary": "auto", "effort": "low"}}, "reasoning.summary, reasoning.effort"),
    ("responses", {"truncation": "auto", "prompt_cache_key": "a", "client_metadata": {"a": "b"}, "store": True}, 4),
    ("responses", {"tools": WEB_SEARCH, "tool_choice": "auto"}, "tools.web_search, tools.custom"),
    ("responses", {"text": {"verbosity": "high"}}, "text.verbosity"),
    ("responses", {"stream_options": {"include_obfuscation": True}, "max_tool_calls": 3}, 2),
]


@pytest.mark.parametrize(("endpoint", "fields", "header"), IGNORED)
def test_hints_and_bookkeeping_are_ignored(url, strict, endpoint, fields, header):
    response = post(url, endpoint, fields)
    named = response.headers["X-Linalign-Ignored"]
    assert named == header if isinstance(header, str) else set(named.split(", ")) == fields.keys()
    assert text_of(endpoint, response) == text_of(endpoint, post(url, endpoint, {}))
    refused = post(strict, endpoint, fields)
    if fields.keys() <= {"user", "metadata"}:  # --strict-fields accepts these two
        assert refused.status_code == 200
    else:
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "unknown_field"
        assert refused.json()["error"]["param"] in named


NEUTRAL = [
    ("chat/completions", {"prompt_cache_key": None, "store": False, "audio": None, "logit_bias": None}),
    ("chat/completions", {"function_call": None, "functions": None, "modalities": ["text"], "best_of": 1}),
    ("chat/completions", {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": False}}),
    ("chat/completions", {"use_beam_search": False, "length_penalty": 1.0, "guided_json": None, "mirostat": 0}),
    ("completions", {"suffix": None, "best_of": 1, "grammar": "", "skip_special_tokens": True}),
    ("responses", {"n": 1, "top_k": -1, "repetition_penalty": 1.0, "response_format": {"type": "text"}}),
    ("responses", {"background": False, "conversation": None, "reasoning": {"effort": "none", "summary": None}}),
]


@pytest.mark.parametrize(("endpoint", "fields"), NEUTRAL)
def test_values_that_ask_for_nothing_are_not_named(url, strict, endpoint, fields):
    for server in (url, strict):
        response = post(server, endpoint, fields)
        assert response.status_code == 200, response.text
        assert "X-Linalign-Ignored" not in response.headers


@pytest.mark.parametrize(
    ("endpoint", "fields", "param", "hint"),
    [
        ("chat/completions", {"temprature": 1}, "temprature", "did you mean temperature?"),
        ("chat/completions", {"maxTokens": 1}, "maxTokens", "did you mean max_tokens?"),
        ("chat/completions", {"principal": "Be kind."}, "principal", "did you mean principle?"),
        ("chat/completions", {"temprature": 0}, "temprature", "did you mean temperature?"),
        ("chat/completions", {"alignement_ratio": 0}, "alignement_ratio", "did you mean alignment_ratio?"),
        ("chat/completions", {"alignment_strength": 2}, "alignment_strength", "no such field"),
        ("chat/completions", {"text": {"format": {"type": "json_object"}}}, "text", "this endpoint has no such field"),
        ("chat/completions", {"messages": None, "message": CHAT["messages"]}, "message", "did you mean messages?"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a", "principle": "Be kind."}]},
            "messages.0.principle",
            "no such field",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "contents": "a"}]},
            "messages.0.contents",
            "did you mean content?",
        ),
        ("completions", {"messages": CHAT["messages"]}, "messages", "this endpoint has no such field"),
        ("responses", {"stop": ["x"]}, "stop", "this endpoint has no such field"),
        ("responses", {"max_tokens": 3}, "max_tokens", "this endpoint has no such field"),
    ],
)
def test_fields_that_look_like_ours_are_refused(url, endpoint, fields, param, hint):
    body = {"model": "smollm2", **BODIES[endpoint], **fields}
    body = {name: value for name, value in body.items() if value is not None}
    response = httpx.post(f"{url}/v1/{endpoint}", json=body, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unknown_field", param)
    assert hint in error["message"]


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("chat/completions", {"guided_json": {"type": "object"}}),
        ("chat/completions", {"extra_body": {"principle": "Be kind."}}),
        ("chat/completions", {"audio": {"voice": "alloy"}}),
        ("chat/completions", {"modalities": ["text", "audio"]}),
        ("chat/completions", {"use_beam_search": True}),
        ("chat/completions", {"skip_special_tokens": False}),
        ("chat/completions", {"typical_p": 0}),
        ("completions", {"suffix": "end"}),
        ("completions", {"best_of": 3}),
        ("responses", {"background": True}),
        ("responses", {"previous_response_id": "resp_1"}),
    ],
)
def test_what_would_change_the_reply_is_refused(url, endpoint, fields):
    response = post(url, endpoint, fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in fields


def test_a_tool_of_another_type_cannot_be_required(url):
    for endpoint in ("chat/completions", "responses"):
        response = post(url, endpoint, {"tools": WEB_SEARCH, "tool_choice": "required"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")


def test_max_tokens_that_the_kv_cache_cuts_is_named(own_server):
    """Four branches of this length fit the context, but not the cache together."""
    url, engine = own_server
    principles = [{"text": f"Be {word}."} for word in ("brief", "kind", "formal")]
    fields = {"principle": principles, "max_tokens": 6000, "stop_token_ids": [5], "logit_bias": {"5": 100}}
    response = post(url, "chat/completions", fields)
    assert engine.max_model_len > 6000
    assert engine.pool.num_pages * engine.pool.page_size < 4 * 6000
    assert response.headers["X-Linalign-Ignored"] == "max_tokens"
    assert "X-Linalign-Ignored" not in post(url, "chat/completions", {**fields, "max_tokens": 3000}).headers
    alone = {**fields, "principle": principles[:1]}
    assert "X-Linalign-Ignored" not in post(url, "chat/completions", alone).headers


def test_many_unknown_fields_take_little_time_and_a_bounded_header(url):
    began = time.monotonic()
    response = post(url, "chat/completions", {f"unknown{i}é": i + 1 for i in range(9000)})
    assert response.status_code == 200
    assert time.monotonic() - began < 20  # comparing each with all known names would take minutes
    header = response.headers["X-Linalign-Ignored"]
    assert len(header) <= MAX_HEADER + 10
    assert header.isascii()
    assert header.startswith("unknown0%C3%A9, ")


def test_ignored_fields_are_in_the_debug_log(tmp_path):
    with (tmp_path / "stderr").open("w") as stderr:
        level = "import logging; logging.getLogger('linalign').setLevel('DEBUG')"
        with serving(stderr=stderr, patch=level) as (url, _):
            post(url, "chat/completions", {"prompt_cache_key": "a secret"})
    log = (tmp_path / "stderr").read_text()
    assert "Ignored fields: prompt_cache_key" in log
    assert "a secret" not in log


def test_headers_hold_any_name():
    assert header_of(["a.b", "c d\r\n", "é"]) == "a.b, c%20d%0D%0A, %C3%A9"
    assert len(header_of([f"field{i}" for i in range(1000)])) <= MAX_HEADER + 5


@pytest.mark.parametrize("name", ["modelId", "message_id", "stream_id", "uid", "content_id"])
def test_names_of_identifiers_are_no_misspellings(name):
    assert similar_name(name, ["model", "messages", "stream", "id", "content"]) is None


@pytest.mark.parametrize(
    "name", ["reasoning_details", "prompt_cache_key", "provider", "cache_prompt", "id_slot", "top_a"]
)
def test_names_of_other_servers_are_no_misspellings(name):
    known = ["reasoning_content", "prompt", "principle", "cache_salt", "top_p", "top_k", "stop", "seed"]
    assert similar_name(name, known) is None
