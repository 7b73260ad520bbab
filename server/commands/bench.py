"""linalign bench: sends load to an OpenAI-compatible server and measures its replies."""

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
from linalign.server.commands.terminal import printable
from linalign.server.settings import API_KEY, FIRST_MODEL, Arguments, client_key

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")


class BenchSettings(Arguments):
    """Send chats of random words to an OpenAI-compatible server, and print latencies and tokens per second."""

    EPILOG: ClassVar[str] = """
The table is written to stdout, a progress bar to stderr. Percentiles are of successful requests. Failed requests are
counted, and their errors listed below the table.

examples:
  linalign bench --concurrency 16
  linalign bench --principle "Be brief." --requests 64 --output aligned.json
  linalign bench --request-rate 2 --requests 100     # independent of replies
  linalign bench --prompt-words 2000 --max-tokens 1  # only prefill
  linalign bench http://127.0.0.1:8123 --model smollm2:teacher
  LINALIGN_API_KEY=key-1 linalign bench https://models.example.org

exit status:
  0  done, even if requests failed
  1  the server can't be reached, or an option has an invalid value
  2  unknown option
"""

    model_config = SettingsConfigDict(cli_prog_name="linalign bench")

    url: CliPositionalArg[str] = Field("http://127.0.0.1:8000", description="the server, without /v1")
    model: str | None = Field(None, title="NAME", description=FIRST_MODEL)
    api_key: str = Field(default_factory=client_key, title="KEY", description=API_KEY)
    requests: int = Field(16, ge=1, title="N", description="number of measured requests")
    warmup: int = Field(2, ge=0, title="N", description="number of requests before the measured ones")
    concurrency: int = Field(1, ge=1, title="N", description="number of simultaneous requests")
    request_rate: float | None = Field(
        None,
        gt=0,
        title="RATE",
        description="arrivals per second (Poisson process), instead of a fixed concurrency (default: none)",
    )
    prompt_words: int = Field(40, ge=1, title="N", description="random words per prompt, of about one token each")
    max_tokens: int = Field(128, ge=1, title="TOKENS", description="longest reply")
    temperature: float = Field(0.0, ge=0, title="T", description="0 is greedy")
    principle: str | None = Field(
        None, title="TEXT", description="principle for the replies; needs a linalign server (default: none)"
    )
    alignment_ratio: float | None = Field(
        None, title="RATIO", description="how strongly replies follow the principle (default: the server's)"
    )
    seed: int = Field(0, title="N", description="seed of words and arrivals")
    output: Path | None = Field(
        None, title="FILE", description="JSON file for the result and the settings (default: none)"
    )


@dataclass(slots=True)
class Measured:
    """Measurements of one request. Times are in seconds since it was sent."""

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
    """Run the load. Raises httpx.HTTPError if there is no server. advance: Called after every request."""
    headers = {"Authorization": f"Bearer {settings.api_key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=settings.url, headers=headers, timeout=600, limits=limits) as client:
        model = settings.model or await _first_model(client)
        bodies = chats(settings, model)
        await _run_concurrently(client, bodies[: settings.warmup], settings.concurrency, advance)
        started = time.perf_counter()
        if settings.request_rate is None:
            measured = await _run_concurrently(client, bodies[settings.warmup :], settings.concurrency, advance)
        else:
            measured = await _run_at_rate(
                client, bodies[settings.warmup :], settings.request_rate, settings.seed, advance
            )
        wall = time.perf_counter() - started
    return {
        "settings": settings.model_dump(mode="json", exclude={"api_key"}),
        "model": model,
        **summary(measured, wall),
    }


def summary(measured: list[Measured], wall: float) -> dict[str, Any]:
    """Percentiles in milliseconds and throughput in tokens per second, of successful requests."""
    succeeded = [m for m in measured if m.error is None]
    gaps = [later - earlier for m in succeeded for earlier, later in zip(m.arrivals, m.arrivals[1:], strict=False)]
    return {
        "requests": len(succeeded),
        "failures": [m.error for m in measured if m.error is not None],
        "wall_s": round(wall, 3),
        "prompt_tokens": sum(m.prompt_tokens for m in succeeded),
        "completion_tokens": sum(m.completion_tokens for m in succeeded),
        "tokens_per_s": round(sum(m.completion_tokens for m in succeeded) / wall, 2),
        "time_to_first_token_ms": _percentiles([m.arrivals[0] for m in succeeded if m.arrivals]),
        "inter_token_ms": _percentiles(gaps),
        "end_to_end_ms": _percentiles([m.total for m in succeeded]),
    }


def table_of(result: dict[str, Any]) -> Table:
    """The result as a table."""
    title = (
        f"{printable(result['model'])}: {result['requests']} requests, {len(result['failures'])} failures, "
        f"{result['wall_s']} s"
    )
    caption = f"{result['completion_tokens']} tokens, {result['tokens_per_s']} per second"
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
    rng = random.Random(settings.seed)
    extra = {"principle": settings.principle, "alignment_ratio": settings.alignment_ratio}
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=settings.prompt_words))}],
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


async def _run_concurrently(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], concurrency: int, advance: Callable[[], None]
) -> list[Measured]:
    semaphore = asyncio.Semaphore(concurrency)

    async def one(body: dict[str, Any]) -> Measured:
        async with semaphore:
            return await _request(client, body, advance)

    return list(await asyncio.gather(*map(one, bodies)))


async def _run_at_rate(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], rate: float, seed: int, advance: Callable[[], None]
) -> list[Measured]:
    rng = random.Random(seed)
    tasks = []
    for body in bodies:
        tasks.append(asyncio.create_task(_request(client, body, advance)))
        await asyncio.sleep(rng.expovariate(rate))
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
                    _record(json.loads(event.data), measured, time.perf_counter() - started)
    except (httpx.HTTPError, SSEError) as error:
        measured.error = repr(error)
    finally:
        advance()
    measured.total = time.perf_counter() - started
    return measured


def _record(chunk: dict[str, Any], measured: Measured, now: float) -> None:
    if "error" in chunk:
        measured.error = str(chunk["error"])
    if any(choice.get("delta", {}).get("content") for choice in chunk.get("choices", ())):
        measured.arrivals.append(now)
    if chunk.get("usage"):
        measured.prompt_tokens = chunk["usage"]["prompt_tokens"]
        measured.completion_tokens = chunk["usage"]["completion_tokens"]
