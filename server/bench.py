"""linalign bench: load against any OpenAI-compatible server, and how it answers."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
from pydantic import Field
from pydantic_settings import CliApp, CliPositionalArg, SettingsConfigDict

from server.settings import Arguments

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


class BenchSettings(Arguments):
    """Send chats to an OpenAI-compatible server and report latencies and throughput."""

    model_config = SettingsConfigDict(cli_prog_name="linalign bench")

    url: CliPositionalArg[str] = Field("http://127.0.0.1:8000", description="the server, without /v1")
    model: str | None = Field(None, description="the first that the server lists where none is given")
    api_key: str = "none"
    requests: int = Field(16, ge=1, description="requests that count")
    warmup: int = Field(2, ge=0, description="requests before them that do not")
    concurrency: int = Field(1, ge=1, description="requests at once")
    request_rate: float | None = Field(
        None, gt=0, description="arrivals a second (Poisson) in place of a fixed concurrency"
    )
    prompt_words: int = Field(40, ge=1, description="random words a prompt, a token each or nearly")
    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0)
    principle: str | None = Field(None, description="align the replies; for linalign servers")
    alignment_ratio: float | None = None
    seed: int = 0
    output: Path | None = Field(None, description="write the result as JSON here too")


@dataclass(slots=True)
class Measured:
    """One request, times in seconds since it was sent."""

    arrivals: list[float] = field(default_factory=list)
    total: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


def main(args: list[str]) -> None:
    settings = CliApp.run(BenchSettings, cli_args=args)
    result = asyncio.run(bench(settings))
    print(json.dumps(result, indent=2))
    if settings.output:
        settings.output.write_text(json.dumps(result) + "\n")


async def bench(settings: BenchSettings) -> dict[str, Any]:
    """Run the load; raises httpx.HTTPError when there is no server."""
    headers = {"Authorization": f"Bearer {settings.api_key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=settings.url, headers=headers, timeout=600, limits=limits) as client:
        model = settings.model or await _first_model(client)
        bodies = chats(settings, model)
        await _all_at(client, bodies[: settings.warmup], settings.concurrency)
        started = time.perf_counter()
        if settings.request_rate is None:
            measured = await _all_at(client, bodies[settings.warmup :], settings.concurrency)
        else:
            measured = await _arriving(client, bodies[settings.warmup :], settings.request_rate, settings.seed)
        wall = time.perf_counter() - started
    return {
        "settings": settings.model_dump(mode="json", exclude={"api_key"}),
        "model": model,
        **summary(measured, wall),
    }


def summary(measured: list[Measured], wall: float) -> dict[str, Any]:
    """Percentiles in milliseconds, throughput in tokens a second; failures are counted, not averaged."""
    good = [m for m in measured if m.error is None]
    gaps = [later - earlier for m in good for earlier, later in zip(m.arrivals, m.arrivals[1:], strict=False)]
    return {
        "requests": len(good),
        "failures": [m.error for m in measured if m.error is not None],
        "wall_s": round(wall, 3),
        "prompt_tokens": sum(m.prompt_tokens for m in good),
        "completion_tokens": sum(m.completion_tokens for m in good),
        "tokens_per_s": round(sum(m.completion_tokens for m in good) / wall, 2),
        "time_to_first_token_ms": _percentiles([m.arrivals[0] for m in good if m.arrivals]),
        "inter_token_ms": _percentiles(gaps),
        "end_to_end_ms": _percentiles([m.total for m in good]),
    }


def _percentiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    cuts = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return {f"p{p}": round(cuts[p - 1] * 1e3, 2) for p in (50, 90, 99)}


def chats(settings: BenchSettings, model: str) -> list[dict[str, Any]]:
    chance = random.Random(settings.seed)
    extra = {"principle": settings.principle, "alignment_ratio": settings.alignment_ratio}
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": " ".join(chance.choices(WORDS, k=settings.prompt_words))}],
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in extra.items() if value is not None},
        }
        for _ in range(settings.warmup + settings.requests)
    ]


async def _first_model(client: httpx.AsyncClient) -> str:
    response = await client.get("/v1/models")
    response.raise_for_status()
    model: str = response.json()["data"][0]["id"]
    return model


async def _all_at(client: httpx.AsyncClient, bodies: list[dict[str, Any]], concurrency: int) -> list[Measured]:
    turn = asyncio.Semaphore(concurrency)

    async def one(body: dict[str, Any]) -> Measured:
        async with turn:
            return await _request(client, body)

    return list(await asyncio.gather(*map(one, bodies)))


async def _arriving(client: httpx.AsyncClient, bodies: list[dict[str, Any]], rate: float, seed: int) -> list[Measured]:
    chance = random.Random(seed)
    tasks = []
    for body in bodies:
        tasks.append(asyncio.create_task(_request(client, body)))
        await asyncio.sleep(chance.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def _request(client: httpx.AsyncClient, body: dict[str, Any]) -> Measured:
    measured, started = Measured(), time.perf_counter()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                measured.error = f"{response.status_code}: {response.text[:200]}"
                return measured
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _take(json.loads(line[6:]), measured, time.perf_counter() - started)
    except httpx.HTTPError as error:
        measured.error = repr(error)
    measured.total = time.perf_counter() - started
    return measured


def _take(chunk: dict[str, Any], measured: Measured, now: float) -> None:
    if "error" in chunk:
        measured.error = str(chunk["error"])
    if any(choice.get("delta", {}).get("content") for choice in chunk.get("choices", ())):
        measured.arrivals.append(now)
    if chunk.get("usage"):
        measured.prompt_tokens = chunk["usage"]["prompt_tokens"]
        measured.completion_tokens = chunk["usage"]["completion_tokens"]
