"""Measures whether running streams stall while long prompts arrive.

    python benchmarks/fairness.py [--streams 4] [--prompts 4] [--prompt-tokens 4000] [--output FILE]

Aligned streams run. Then aligned prompts of some thousand tokens, all different, arrive one after the other. Prints
the times between a stream's tokens, measured at the client, before and during this: median, 99th percentile, maximum.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving import served
from linalign.server.commands import bench

PRINCIPLE = "Be brief."


def body(content: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": "smollm2", "messages": messages, "principle": PRINCIPLE, "ignore_eos": True, **fields}


async def stream(client: httpx.AsyncClient, number: int, arrivals: list[float]) -> None:
    """Stream one reply after the other, until the task is cancelled."""
    request = body(f"{number}. Tell me about towns.", stream=True, max_tokens=8000)
    while True:
        async with client.stream("POST", "/v1/chat/completions", json=request) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                arrivals += [time.perf_counter()] if line.startswith("data: {") else []


async def prompt(client: httpx.AsyncClient, number: int, num_words: int) -> float:
    """Seconds to the first token of a prompt with this number of words (one token each)."""
    words = " ".join(bench.WORDS[(i * (number + 3) + i // 7) % len(bench.WORDS)] for i in range(num_words))
    began = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=body(f"{number}. {words}", max_tokens=1))
    response.raise_for_status()
    return time.perf_counter() - began


def gaps(arrivals: list[float], begin: float, end: float) -> list[float]:
    return [b - a for a, b in itertools.pairwise(arrivals) if begin <= a and b <= end]


def summary(values: list[float]) -> dict[str, float]:
    percentiles = statistics.quantiles(values, n=100)
    median = statistics.median(values)
    return {
        "tokens": len(values),
        "median_ms": 1000 * median,
        "p99_ms": 1000 * percentiles[98],
        "longest_ms": 1000 * max(values),
        "p99_over_median": percentiles[98] / median,
    }


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        arrivals: list[list[float]] = [[] for _ in range(args.streams)]
        running = [asyncio.ensure_future(stream(client, i, arrivals[i])) for i in range(args.streams)]
        while not all(len(one) > 10 for one in arrivals):
            await asyncio.sleep(0.1)
        began = time.perf_counter()
        await asyncio.sleep(5)
        arrived = time.perf_counter()
        waits = [await prompt(client, i, args.prompt_tokens) for i in range(args.prompts)]
        ended = time.perf_counter()
        for one in running:
            one.cancel()
        return {
            "before": summary([gap for one in arrivals for gap in gaps(one, began, arrived)]),
            "meanwhile": summary([gap for one in arrivals for gap in gaps(one, arrived, ended)]),
            "first token of the long prompts, s": waits,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with served() as (url, _):
        while True:
            try:
                httpx.get(url + "/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        result = asyncio.run(measure(url, args))
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
