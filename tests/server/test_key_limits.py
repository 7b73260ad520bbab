"""Limits per API key, and that one key's use does not affect another."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from opentelemetry import trace
from starlette.requests import Request

from linalign import Output, Prompt, SamplingParams, Usage
from linalign.alignment_core.output import terminal_output
from linalign.server.exchange import Exchange, exchange_of
from linalign.server.middleware.key_limits import Bucket
from linalign.server.protocol.completions import CompletionRequest
from linalign.server.replies.submission import Replies
from linalign.server.settings import Settings

pytestmark = pytest.mark.slow

BODY = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about towns."}], "ignore_eos": True}


@pytest.fixture(scope="module")
def limited(serving_small):
    limits = ("--max-requests-per-key", "2", "--max-tokens-per-minute-per-key", "300")
    with serving_small("--api-keys", "one,two,three,four", *limits) as (url, _):
        yield url


def client_of(url, key):
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def refusal(response):
    assert response.status_code == 429, response.text
    assert response.json()["error"]["type"] == "rate_limit_error"
    return response.json()["error"]["code"], int(response.headers["Retry-After"])


def test_a_key_has_a_limit_of_simultaneous_requests(limited):
    one, two = client_of(limited, "one"), client_of(limited, "two")
    long = BODY | {"max_tokens": 3000, "stream": True}
    with one.stream("POST", "/v1/chat/completions", json=long) as first:
        first_lines = first.iter_lines()
        next(first_lines)
        with one.stream("POST", "/v1/chat/completions", json=long) as second:
            second_lines = second.iter_lines()
            next(second_lines)
            for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"):
                assert refusal(one.post(path, json={})) == ("key_requests", 1)
            assert one.get("/v1/models").status_code == 200
            assert two.post("/v1/chat/completions", json=BODY | {"max_tokens": 1}).status_code == 200
    deadline = time.monotonic() + 30
    while one.post("/v1/chat/completions", json=BODY | {"max_tokens": 1}).status_code == 429:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "fields", [{"prompt": ["Towns"] * 3}, {"prompt": "Towns", "n": 3}, {"prompt": ["a", "b"], "n": 2}]
)
def test_choices_count_like_requests(limited, fields):
    """One request may have hundreds of choices and fill the engine. If it is refused, none of them starts."""
    four = client_of(limited, "four")
    many = {"model": "smollm2", "max_tokens": 2, **fields}
    refused = four.post("/v1/completions", json=many)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")  # waiting would not help
    long = BODY | {"max_tokens": 3000, "stream": True}
    with four.stream("POST", "/v1/chat/completions", json=long) as first:
        first_lines = first.iter_lines()
        next(first_lines)
        two = {"model": "smollm2", "max_tokens": 2, "prompt": ["Towns"] * 2}
        assert refusal(four.post("/v1/completions", json=two)) == ("key_requests", 1)
    few = {"model": "smollm2", "max_tokens": 2, "prompt": ["Towns"] * 2}
    deadline = time.monotonic() + 30
    while four.post("/v1/completions", json=few).status_code == 429:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_choice_that_is_refused_later_does_not_count(limited):
    four = client_of(limited, "four")
    for _ in range(4):
        too_long = {"model": "smollm2", "prompt": "x " * 9000, "max_tokens": 1}
        assert four.post("/v1/completions", json=too_long).status_code == 400
    assert four.post("/v1/completions", json={"model": "smollm2", "prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_key_has_a_limit_of_tokens_per_minute(limited):
    three, four = client_of(limited, "three"), client_of(limited, "four")
    used = 0  # may exceed 300, because five more tokens are granted each second until the refusal
    body = BODY | {"max_tokens": 120, "principle": "Be brief."}
    prompt_fields = {name: body[name] for name in ("model", "messages", "principle")}
    base = four.post("/tokenize", json=prompt_fields).json()["branches"][-1]["tokens"]
    while (response := three.post("/v1/chat/completions", json=body)).status_code == 200:
        usage = response.json()["usage"]
        used += usage["total_tokens"] + usage["completion_tokens"] + len(base)  # tokens of both branches
        assert used < 3000
    code, seconds = refusal(response)
    assert code == "key_tokens"
    assert used >= 300
    assert 1 <= seconds <= 1 + (used - 300) / 5
    assert four.post("/v1/chat/completions", json=BODY | {"max_tokens": 1}).status_code == 200
    assert three.get("/metrics").text.count('requests_rejected_total{code="key_tokens"} 1.0') == 1


def test_tokens_of_an_abandoned_reply_are_counted(limited):
    two = client_of(limited, "two")
    refused = None
    deadline = time.monotonic() + 60
    while refused is None:
        assert time.monotonic() < deadline
        with two.stream("POST", "/v1/chat/completions", json=BODY | {"max_tokens": 3000, "stream": True}) as response:
            if response.status_code == 429:
                refused = response.read()
                break
            lines = response.iter_lines()
            for _ in range(100):
                next(lines)
    assert b"key_tokens" in refused or b"key_requests" in refused


def test_a_bucket_is_refilled_up_to_its_capacity(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bucket = Bucket(60)
    assert bucket.wait == 0
    bucket.take(65)
    assert bucket.wait == pytest.approx(6)
    now[0] += 6
    assert bucket.wait == 0
    now[0] += 1000
    bucket.take(60)
    assert bucket.wait == pytest.approx(1)


def test_tokens_of_every_branch_are_charged():
    ids = tuple(range(5, 105))
    many = Prompt(((*ids, 1, 2), (*ids, 3)), (0.5, 0.5), (2.0, 2.0), ids)
    scored = replace(many, given=(7,) * 40)
    for prompt, num_tokens in ((Prompt((ids,)), 100), (many, 102 + 101 + 100), (scored, 303 + 3 * 40)):
        charged = []
        exchange = Exchange(charge=charged.append)
        exchange.count_prompt(prompt)
        assert charged == [num_tokens]
        exchange.count_output(Output("", (), "length", Usage(100, 0, 20, len(prompt.branches), 0, 0, 0)))
        assert charged[1:] == [20 * len(prompt.branches)]


def test_a_refused_request_is_not_charged(serving_small):
    """None of its prompts is charged, even if the first was accepted. Tokenizing is not charged either."""
    limits = ("--max-tokens-per-minute-per-key", "300")
    with serving_small("--api-keys", "one", *limits) as (url, _):
        one = client_of(url, "one")
        for _ in range(4):
            refused = {"model": "smollm2", "prompt": ["Towns " * 250, "Towns " * 9000], "max_tokens": 1}
            assert one.post("/v1/completions", json=refused).status_code == 400
        assert one.post("/v1/chat/completions", json=BODY | {"max_tokens": 300}).status_code == 200
        assert refusal(one.post("/v1/chat/completions", json=BODY))[0] == "key_tokens"
        assert one.post("/tokenize", json={"model": "smollm2", "prompt": "Towns"}).status_code == 200


def test_a_cancelled_request_is_counted_down_once():
    """The engine reports the end of a choice whose submission was cancelled, but not of choices that it never got."""
    assert asyncio.run(places_given_back_by_a_cancelled_request(3)) == 3


async def places_given_back_by_a_cancelled_request(num_prompts):
    places_freed, submitted = [], []

    class Engine:
        async def submit(self, prompt, _, on_output, n):
            if not submitted:
                submitted.append(prompt)
                on_output(terminal_output(prompt, 0, "length"))
                return 1
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                for choice in range(n):
                    on_output(terminal_output(prompt, choice, "abort"))
                raise

        def abort(self, request_id):
            pass

    state = SimpleNamespace(
        engine=Engine(),
        settings=Settings(),
        tracer=trace.NoOpTracer(),
        measures=SimpleNamespace(listener=lambda *_: lambda _: None),
    )
    request = Request({"type": "http", "app": SimpleNamespace(state=SimpleNamespace(server=state)), "state": {}})
    exchange_of(request.scope).leave = places_freed.append
    body = CompletionRequest(model="m", prompt="a")
    prompts = [Prompt(((5, 6, 7),))] * num_prompts
    submitting = asyncio.ensure_future(Replies.submit(request, body, prompts, SamplingParams(max_tokens=1)))
    while not submitted:
        assert not submitting.done()
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    await asyncio.sleep(0.01)
    return sum(places_freed)
