"""The log: one line for every request, with its id, and no secrets."""

import json
import re
import time

import httpx
import pytest

from tests.serving import serving

KEY = "a-very-secret-key"
PROMPT = "My password is swordfish."
PRINCIPLE = "Mention the harbour."
BODY = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": PROMPT}],
    "principle": PRINCIPLE,
    "max_tokens": 3,
    "ignore_eos": True,
}
BREAK_A_ROUTE = """
import linalign.server.routes.tokens as tokens
def broken(*args):
    raise ValueError("injected")
tokens.preset_of = broken
"""


@pytest.fixture(scope="module")
def logged(embedded, tmp_path_factory):  # noqa: ARG001 - loads the model first, so that the server finds its copy
    """A server that logs JSON to a file; yields its URL and a function that returns the parsed lines."""
    file = tmp_path_factory.mktemp("log") / "stderr"
    with (
        file.open("w") as stderr,
        serving("--log-format", "json", "--api-keys", KEY, patch=BREAK_A_ROUTE, stderr=stderr) as (url, _),
    ):
        yield url, lambda: [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]


def post(url, path="/v1/chat/completions", body=BODY, **headers):
    return httpx.post(url + path, json=body, headers={"Authorization": f"Bearer {KEY}", **headers}, timeout=60)


def request_lines(lines, id):
    """The log lines of a request. Waits for them, because they are written after the response was sent."""
    deadline = time.monotonic() + 10
    while not (result := [line for line in lines() if line["request_id"] == id and "request" in line]):
        assert time.monotonic() < deadline, f"there is no line about {id}"
        time.sleep(0.01)
    return result


def test_every_request_is_a_line_with_its_id(logged):
    url, lines = logged
    response = post(url, **{"X-Request-Id": "abc-1"})
    assert response.headers["X-Request-Id"] == "abc-1"
    (line,) = request_lines(lines, "abc-1")
    facts, usage = line["request"], response.json()["usage"]
    assert (line["level"], line["logger"]) == ("INFO", "linalign.server.middleware.access_log")
    assert (facts["method"], facts["path"], facts["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (facts["prompt_tokens"], facts["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert facts["finish_reasons"] == "length"
    assert facts["client"] == "127.0.0.1"
    assert 0 < facts["seconds"] < 60


def test_requests_do_not_share_data(logged):
    url, lines = logged
    for number in range(3):
        post(url, **{"X-Request-Id": f"apart-{number}"})
    requests = [request_lines(lines, f"apart-{number}")[0]["request"] for number in range(3)]
    assert len({facts["prompt_tokens"] for facts in requests}) == 1
    assert [facts["completion_tokens"] for facts in requests] == [3, 3, 3]


def test_a_stream_is_logged_after_its_end(logged):
    url, lines = logged
    text = post(url, body=BODY | {"stream": True}, **{"X-Request-Id": "streamed"}).text
    assert text.rstrip().endswith("[DONE]")
    (line,) = request_lines(lines, "streamed")
    assert line["request"]["completion_tokens"] == 3


def test_a_disconnect_is_logged(logged):
    url, lines = logged
    body = BODY | {"stream": True, "max_tokens": 3000, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "left"}
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, headers=headers, timeout=60) as response:
        next(response.iter_lines())
    (line,) = request_lines(lines, "left")
    assert line["request"]["client_left"] is True
    post(url, body=BODY | {"stream": True}, **{"X-Request-Id": "stayed"})
    assert "client_left" not in request_lines(lines, "stayed")[0]["request"]


@pytest.mark.parametrize("id", ["", "with space", "x" * 129, 'quote"', "<script>"])
def test_unsafe_request_ids_are_replaced(logged, id):
    url, lines = logged
    new_id = post(url, **{"X-Request-Id": id}).headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", new_id)
    assert request_lines(lines, new_id)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/chat/completions", BODY | {"modle": 1}, 400, "unknown_field"),
        ("/v1/chat/completions", BODY | {"model": "x"}, 404, "model_not_found"),
        ("/nowhere", {}, 404, "not_found"),
        ("/detokenize", {"model": "smollm2", "tokens": [1]}, 500, "internal_error"),
    ],
)
def test_errors_have_ids_and_codes_too(logged, path, body, status, code):
    url, lines = logged
    response = post(url, path, body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    (line,) = request_lines(lines, response.headers["X-Request-Id"])
    assert (line["request"]["status"], line["request"]["code"]) == (status, code)


def test_an_exception_is_logged_with_the_request_id_and_hidden_from_the_client(logged):
    url, lines = logged
    response = post(url, "/detokenize", {"model": "smollm2", "tokens": [1]})
    assert "injected" not in response.text
    id = response.headers["X-Request-Id"]
    assert any("injected" in line.get("exc_info", "") for line in lines() if line["request_id"] == id)


def test_a_path_is_logged_in_one_line(logged):
    url, lines = logged
    response = post(url, "/a%0a2026-01-01%20INFO%20forged", **{"X-Request-Id": "forged"})
    assert response.status_code == 404
    (line,) = request_lines(lines, "forged")
    assert "\n" not in line["message"]


def test_secrets_and_prompts_are_not_logged(logged):
    url, lines = logged
    reply = post(url).json()["choices"][0]["message"]["content"]
    post(url, body=BODY | {"stream": True})
    post(url, body=BODY | {"max_tokens": "many"})
    post(url, "/v1/completions", {"model": "smollm2", "prompt": PROMPT, "max_tokens": 2})
    post(url, "/v1/models?key=" + KEY)
    headers = {"Authorization": "Bearer wrong-key", "X-Request-Id": "last"}
    httpx.post(url + "/v1/chat/completions", json=BODY, headers=headers)
    assert request_lines(lines, "last")
    text = json.dumps(lines())
    for secret in (KEY, "wrong-key", "swordfish", "harbour", reply):
        assert secret not in text


def test_successful_health_and_metrics_requests_are_not_logged(logged):
    url, lines = logged
    httpx.get(url + "/health")
    assert httpx.get(url + "/metrics", headers={"X-Request-Id": "refused"}).status_code == 401
    assert request_lines(lines, "refused")
    facts = [line["request"] for line in lines() if "request" in line]
    assert not any(fact["path"] == "/health" for fact in facts)


def test_text_has_the_id_in_every_line(tmp_path):
    with (tmp_path / "stderr").open("w") as stderr, serving(stderr=stderr) as (url, _):
        httpx.post(url + "/v1/chat/completions", json=BODY, headers={"X-Request-Id": "abc-2"}, timeout=60)
    text = (tmp_path / "stderr").read_text()
    assert re.search(r"INFO linalign\.server\.middleware\.access_log \[abc-2\]: method=POST path=\S+ status=200 ", text)
    assert "swordfish" not in text
