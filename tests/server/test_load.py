"""Many clients at once: every reply arrives complete, once, and at the right client."""

import asyncio
import json
import resource

import httpx
import pytest

from linalign import Principle, SamplingParams
from tests.counts import counted
from tests.engines import make_engine, run_all
from tests.serving import serving

pytestmark = pytest.mark.slow

NUM_STREAMS, NUM_TOKENS = counted(50, 500), 6
PLACES = ("town", "lake", "valley", "island", "forest")
TOPICS = ("its weather", "its people", "its food", "its roads", "its songs")
PRINCIPLES = ("Be brief.", "Be poetic.", "Mention the sea.", "Speak to a child.", "Praise cycling.")


def case(number):
    """(messages, principle, ratio, seed) of one of 125 different requests."""
    number %= 125
    place, topic, principle = PLACES[number % 5], TOPICS[number // 5 % 5], PRINCIPLES[number // 25]
    return [{"role": "user", "content": f"Tell me about a {place} and {topic}."}], principle, 1 + number % 3, number


@pytest.fixture(scope="module")
def expected(embedded):
    """The text of each request's reply when it runs alone."""
    texts = []
    for number in range(min(125, NUM_STREAMS)):
        messages, principle, ratio, seed = case(number)
        engine = make_engine(embedded, num_pages=64)
        prompt = engine.prompts.build(messages, [Principle(principle, ratio=float(ratio))])
        params = SamplingParams(temperature=0.8, seed=seed, max_tokens=NUM_TOKENS, ignore_eos=True)
        (outputs,) = run_all(engine, [(prompt, params)])
        texts.append("".join(output.text for output in outputs))
    assert len(set(texts)) > 0.8 * len(texts)  # so that mixed-up replies would be noticed
    return texts


async def stream(client, number, collected):
    messages, principle, ratio, seed = case(number)
    body = {"model": "smollm2", "messages": messages, "principle": principle, "alignment_ratio": ratio, "seed": seed}
    body |= {"temperature": 0.8, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]  # pings are comments
        collected[number] = (response.status_code, response.headers["X-Request-Id"], lines)


def test_simultaneous_streams_each_get_their_own_text(embedded, expected):  # noqa: ARG001
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    collected = [None] * NUM_STREAMS

    async def all_of_them(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
            await asyncio.gather(*(stream(client, number, collected) for number in range(NUM_STREAMS)))
            return (await client.get("/metrics")).text

    with serving("--max-num-seqs", "128") as (url, _):
        metrics = asyncio.run(all_of_them(url))
    chunk_ids, request_ids = set(), set()
    for number, (status, request_id, lines) in enumerate(collected):
        assert status == 200
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        texts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
        assert "".join(texts) == expected[number % 125]
        assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]].count("length") == 1
        assert chunks[-1]["usage"]["completion_tokens"] == NUM_TOKENS
        (chunk_id,) = {chunk["id"] for chunk in chunks}
        chunk_ids.add(chunk_id)
        request_ids.add(request_id)
    assert len(chunk_ids) == len(request_ids) == NUM_STREAMS
    assert f'linalign:request_success_total{{finished_reason="length"}} {NUM_STREAMS}.0' in metrics
    assert f"linalign:generation_tokens_total {NUM_STREAMS * NUM_TOKENS}.0" in metrics
    assert "linalign:num_requests_running 0.0" in metrics
    assert "linalign:kv_cache_usage_perc 0.0" in metrics
