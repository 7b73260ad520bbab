"""`linalign serve` on this machine, over HTTP: start, memory, a chat's second turn, streams versus the engine alone.

    python benchmarks/serving.py [--streams 1 16 64] [--output FILE]

The start is measured from the command to the first token. Run it twice, so that the converted model is in the cache
and the libraries are in the page cache. Streams are aligned. The engine alone runs the same prompts in its own
process without HTTP, before the server starts.
"""

import argparse
import asyncio
import json
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from linalign.server.commands import bench
from linalign.server.commands.bench import BenchSettings

PRINCIPLE = "Answer in favour of solar power."
ALONE = """
import json, sys, time
from linalign import Engine, Principle, SamplingParams
warmup, counted = json.load(sys.stdin)
engine = Engine.load()
for bodies in (warmup, counted):
    started = time.perf_counter()
    for body in bodies:
        prompt = engine.prompts.build(body["messages"], [Principle(body["principle"], ratio=body["alignment_ratio"])])
        engine.submit(prompt, SamplingParams(temperature=0, max_tokens=body["max_tokens"]), lambda output: None)
    while engine.step():
        pass
    print(time.perf_counter() - started)
"""


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("linalign"), "serve", "--port", str(port)], stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


def first_token(url: str, messages: list[dict[str, str]], max_tokens: int = 1) -> tuple[float, str]:
    """Seconds to the first content of an aligned stream, and the whole reply. Retries until the server is up."""
    body = {
        "messages": messages,
        "principle": PRINCIPLE,
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "model": "smollm2",
    }
    while True:
        started, first, text = time.perf_counter(), 0.0, ""
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        choices = json.loads(line[6:])["choices"]
                        content = choices[0]["delta"].get("content") if choices else None
                        if content and not first:
                            first = time.perf_counter() - started
                        text += content or ""
            return first, text
        except httpx.ConnectError:
            time.sleep(0.02)


def second_turn(url: str, run: int) -> float:
    """Time to first token of the second turn divided by the first turn's, with 1,500 tokens of history."""
    story = " ".join(bench.WORDS[(i * (run + 3)) % len(bench.WORDS)] for i in range(1450))
    messages = [{"role": "user", "content": f"{run}. {story}"}]
    first, reply = first_token(url, messages, max_tokens=32)
    messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "Please go on."}]
    second, _ = first_token(url, messages)
    return second / first


def memory(pid: int) -> float:
    """Resident memory in GB."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) * 1024 / 1e9


def settings(url: str, streams: int) -> BenchSettings:
    return BenchSettings.model_construct(
        url=url,
        model="smollm2",
        requests=streams,
        warmup=streams,
        concurrency=streams,
        max_tokens=64,
        principle=PRINCIPLE,
        alignment_ratio=2.0,
    )


def engine_alone(streams: int) -> float:
    """Seconds that the engine alone needs for the requests of `settings`."""
    bodies = bench.chats(settings("", streams), "smollm2")
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(
        command, input=json.dumps([bodies[:streams], bodies[streams:]]), capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    alone = {streams: engine_alone(streams) for streams in args.streams}
    result: dict[str, Any] = {"streams": {}}
    started = time.perf_counter()
    with served() as (url, pid):
        first_token(url, [{"role": "user", "content": "Hello"}])
        result["start to first token, s"] = time.perf_counter() - started
        result["resident memory after the start, GB"] = memory(pid)
        result["second turn's time to first token over the first's"] = statistics.median(
            second_turn(url, run) for run in range(3)
        )
        for streams in args.streams:
            measured = asyncio.run(bench.bench(settings(url, streams)))
            result["streams"][streams] = {
                "over HTTP, tokens/s": measured["tokens_per_s"],
                "engine alone over HTTP, time": alone[streams] / measured["wall_s"],
                "inter_token_ms": measured["inter_token_ms"],
            }
        result["resident memory after the load, GB"] = memory(pid)
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
