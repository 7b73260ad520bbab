"""linalign bench: load against any OpenAI-compatible server, and how it answers."""

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, ClassVar

import httpx
from httpx_sse import SSEError, aconnect_sse
from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from linalign.server.command_line import parse
from linalign.server.settings import API_KEY, FIRST_MODEL, Arguments, client_key
from linalign.server.terminal import printable

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


class BenchSettings(Arguments):
    """Send chats of random words to an OpenAI-compatible server, and print latencies and tokens a second."""

    EPILOG: ClassVar[str] = """
The table goes to stdout, a progress bar to stderr. Percentiles are over the requests that were answered; others are
counted, and their errors listed below the table.

examples:
  linalign bench --concurrency 16
  linalign bench --principle "Be brief." --requests 64 --output aligned.json
  linalign bench --request-rate 2 --requests 100     # whether or not others end
  linalign bench --prompt-words 2000 --max-tokens 1  # prefill alone
  linalign bench http://127.0.0.1:8123 --model smollm2:teacher
  LINALIGN_API_KEY=key-1 linalign bench https://models.example.org

exit status:
  0  done, also where requests have failed
  1  there is no such server, or an option's value can't be
  2  an unknown option
"""

    model_config = SettingsConfigDict(cli_prog_name="linalign bench")

    url: CliPositionalArg[str] = Field("http://127.0.0.1:8000", description="the server, without /v1")
    model: str | None = Field(None, title="NAME", description=FIRST_MODEL)
    api_key: str = Field(default_factory=client_key, title="KEY", description=API_KEY)
    requests: int = Field(16, ge=1, title="N", description="requests that count")
    warmup: int = Field(2, ge=0, title="N", description="requests before them that do not")
    concurrency: int = Field(1, ge=1, title="N", description="requests at once")
    request_rate: float | None = Field(
        None,
        gt=0,
        title="RATE",
        description="arrivals a second (Poisson), in place of a fixed concurrency (default: none)",
    )
    prompt_words: int = Field(40, ge=1, title="N", description="random words a prompt, a token each or nearly")
    max_tokens: int = Field(128, ge=1, title="TOKENS", description="longest reply")
    temperature: float = Field(0.0, ge=0, title="T", description="0 is greedy")
    principle: str | None = Field(
        None, title="TEXT", description="align the replies; for linalign servers (default: none)"
    )
    alignment_ratio: float | None = Field(
        None, title="RATIO", description="how far to follow the principle (default: the server's own)"
    )
    seed: int = Field(0, title="N", description="decides words and arrivals")
    output: Path | None = Field(
        None, title="FILE", description="write the result, settings included, as JSON here too (default: nowhere)"
    )


@dataclass(slots=True)
class Measured:
    """One request, times in seconds since it was sent."""

    arrivals: list[float] = field(default_factory=list)
    total: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


def main(args: list[str]) -> None:
    settings = parse(BenchSettings, args)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("requests", total=settings.warmup + settings.requests)
        try:
            result = asyncio.run(bench(settings, lambda: progress.advance(bar)))
        except httpx.HTTPError as error:
            sys.exit(f"linalign bench: {settings.url}: {printable(str(error))}")
    Console().print(table_of(result))
    for failure in result["failures"]:
        print(printable(failure))
    if settings.output:
        settings.output.write_text(json.dumps(result) + "\n")


async def bench(settings: BenchSettings, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run the load; raises httpx.HTTPError when there is no server. advance: called after every request."""
    headers = {"Authorization": f"Bearer {settings.api_key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=settings.url, headers=headers, timeout=600, limits=limits) as client:
        model = settings.model or await _first_model(client)
        bodies = chats(settings, model)
        await _all_at(client, bodies[: settings.warmup], settings.concurrency, advance)
        started = time.perf_counter()
        if settings.request_rate is None:
            measured = await _all_at(client, bodies[settings.warmup :], settings.concurrency, advance)
        else:
            measured = await _arriving(client, bodies[settings.warmup :], settings.request_rate, settings.seed, advance)
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


def table_of(result: dict[str, Any]) -> Table:
    """The result as a person reads it."""
    title = (
        f"{printable(result['model'])}: {result['requests']} requests, {len(result['failures'])} failures, "
        f"{result['wall_s']} s"
    )
    caption = f"{result['completion_tokens']} tokens, {result['tokens_per_s']} a second"
    table = Table(title=escape(title), caption=caption)
    table.add_column("ms")
    for name in ("p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for title, name in (
        ("time to first token", "time_to_first_token_ms"),
        ("between tokens", "inter_token_ms"),
        ("whole reply", "end_to_end_ms"),
    ):
        table.add_row(title, *(f"{value:.1f}" for value in (result[name] or {}).values()))
    return table


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


async def _all_at(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], concurrency: int, advance: Callable[[], None]
) -> list[Measured]:
    turn = asyncio.Semaphore(concurrency)

    async def one(body: dict[str, Any]) -> Measured:
        async with turn:
            return await _request(client, body, advance)

    return list(await asyncio.gather(*map(one, bodies)))


async def _arriving(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], rate: float, seed: int, advance: Callable[[], None]
) -> list[Measured]:
    chance = random.Random(seed)
    tasks = []
    for body in bodies:
        tasks.append(asyncio.create_task(_request(client, body, advance)))
        await asyncio.sleep(chance.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def _request(client: httpx.AsyncClient, body: dict[str, Any], advance: Callable[[], None]) -> Measured:
    measured, started = Measured(), time.perf_counter()
    try:
        async with aconnect_sse(client, "POST", "/v1/chat/completions", json=body) as source:
            if source.response.status_code != 200:
                await source.response.aread()
                measured.error = f"{source.response.status_code}: {source.response.text[:200]}"
                return measured
            async for event in source.aiter_sse():
                if event.data != "[DONE]":
                    _take(json.loads(event.data), measured, time.perf_counter() - started)
    except (httpx.HTTPError, SSEError) as error:
        measured.error = repr(error)
    finally:
        advance()
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
