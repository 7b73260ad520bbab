"""Random mixed traffic with random aborts against a real server: checks that nothing is left over afterwards.

    python benchmarks/soak.py [--minutes 20] [--clients 8] [--seed 0] [--output FILE]

A fifth of the time is warm-up. After it, and at the end, the idle server is inspected: resident memory, free pages,
tasks of the event loop, threads, open files. Every request must end as expected: with a complete reply, with the
refusal that it provokes, or because its client left.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from linalign.server.commands.bench import WORDS

NUM_PAGES = 600
# A small KV cache that is resident from the start, and metrics that only the process itself knows.
SERVER = f"""
NUM_PAGES = {NUM_PAGES}
import asyncio, threading
import torch
from linalign.alignment_core import assembly
from linalign.alignment_core.execution import model_runner
from linalign.server import metrics
from prometheus_client.core import GaugeMetricFamily
assembly.pages_that_fit = lambda *_: NUM_PAGES
model_runner._zeros = lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device)
collect = metrics.EngineCollector.collect
def with_more(self):
    yield from collect(self)
    yield GaugeMetricFamily("soak_tasks", "", len(asyncio.all_tasks()))
    yield GaugeMetricFamily("soak_threads", "", threading.active_count())
metrics.EngineCollector.collect = with_more
from linalign.server.commands.main import main; main()
"""
METHODS = ("linear", "cfg", "amulet", "adaptive", "opad")
EDITS: list[dict[str, Any]] = [{"stop": ["e", "xyz"]}, {"presence_penalty": 1}, {"ignore_eos": True}]
EDITS += [{"logit_bias": {"5": 3}}, {"repetition_penalty": 1.2}, {"min_tokens": 1}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
LEFT, DONE, REFUSED = "left", "done", "refused"


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Start a server for this run; yield its URL. It must exit with status 0 at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # By default glibc's malloc creates arenas for new threads. Their growth would hide a leak.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", SERVER, "serve", "--port", str(port), "--max-num-seqs", "16"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(httpx.ConnectError):
                if httpx.get(url + "/health").is_success:
                    break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        assert process.wait(60) == 0, "the server did not end in order"


def text(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def request(rng: random.Random) -> tuple[str, dict[str, Any], int]:
    """A random path and body, and the expected status."""
    body: dict[str, Any] = {"model": "smollm2", "temperature": rng.choice([0, 0.7, 1.5]), "seed": rng.randint(0, 99)}
    if rng.random() < 0.7:
        principle: Any = text(rng, 8)
        if rng.random() < 0.2:
            principle = [{"text": text(rng, 8), "ratio": rng.uniform(-2, 5)} for _ in range(rng.randint(1, 3))]
        body |= {
            "principle": principle,
            "alignment_method": rng.choice(["linear", "cfg", "amulet", "adaptive", "opad"]),
        }
    most = rng.choice([1, 8, 24, 60])
    kind = rng.choice(["chat", "chat", "chat", "text", "responses", "tokenize", "bad"])
    if kind == "tokenize":
        return "/tokenize", {"model": "smollm2", "prompt": text(rng, 300)}, 200
    if kind == "bad":
        wrong = rng.choice([{"max_tokens": "x"}, {"temprature": 1}, {"min_tokens": 10**6}, {"alignment_ratio": 99}])
        return "/v1/completions", body | {"prompt": text(rng, 5)} | wrong, 400
    body["stream"] = rng.random() < 0.6
    if kind == "responses":
        return "/v1/responses", body | {"input": text(rng, 60), "max_output_tokens": most}, 200
    body |= {"max_tokens": most, "n": rng.choice([1, 1, 1, 2])}
    body |= rng.choice(
        [{}, {}, {"stop": ["e", "xyz"]}, {"presence_penalty": 1}, {"ignore_eos": True}, {"logit_bias": {"5": 3}}]
    )
    if kind == "text":
        prompts = [text(rng, 100) for _ in range(rng.choice([1, 1, 3]))]
        return "/v1/completions", body | {"prompt": prompts, "logprobs": rng.choice([None, 3])}, 200
    turns = [{"role": "user", "content": text(rng, rng.choice([10, 10, 400]))}]
    extras: list[dict[str, Any]] = [{}, {}, {"logprobs": True, "top_logprobs": 5}, {"alignment_trace": True}]
    extras += [{"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}]
    extras += [{"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}]
    return "/v1/chat/completions", body | {"messages": turns} | rng.choice(extras), 200


async def ask(client: httpx.AsyncClient, rng: random.Random) -> str:
    """Send one request; returns how it ended. Raises AssertionError for any unexpected end."""
    path, body, status = request(rng)
    leaves_after = rng.choice([None, None, rng.randint(0, 20)])  # lines until the client leaves
    patience = rng.choice([None, None, None, rng.uniform(0, 0.5)])  # seconds until the client leaves

    async def whole() -> str:
        num_lines, last = 0, ""
        async with client.stream("POST", path, json=body) as response:
            if response.status_code == status == 400:
                await response.aread()
                return REFUSED
            assert response.status_code == status, (response.status_code, await response.aread(), body)
            async for line in response.aiter_lines():
                num_lines += 1
                if leaves_after is not None and num_lines > leaves_after:
                    return LEFT
                last = line or last
        if body.get("stream"):
            assert last == "data: [DONE]" or "response.completed" in last or "response.incomplete" in last, last
        else:
            json.loads(last)
        return DONE

    try:
        return await asyncio.wait_for(whole(), patience)
    except TimeoutError:
        assert patience is not None
        return LEFT


async def traffic(url: str, num_clients: int, seconds: float, seed: int) -> Counter[str]:
    ends: Counter[str] = Counter()
    deadline = time.monotonic() + seconds

    async def one(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            while time.monotonic() < deadline:
                ends[await ask(client, rng)] += 1

    await asyncio.gather(*(one(number) for number in range(num_clients)))
    return ends


def snapshot(url: str) -> dict[str, float]:
    """The server's current use of resources."""
    metrics = httpx.get(url + "/metrics", headers={"Connection": "close"}, timeout=60).raise_for_status().text
    values = {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", metrics, re.MULTILINE)}
    return {
        "running": values["linalign:num_requests_running"] + values["linalign:num_requests_waiting"],
        "memory_mb": values["process_resident_memory_bytes"] / 1e6,
        "open_files": values["process_open_fds"],
        "tasks": values["soak_tasks"],
        "threads": values["soak_threads"],
        "free_pages": NUM_PAGES * (1 - values["linalign:kv_cache_usage_perc"]),
    }


def at_rest(url: str) -> dict[str, float]:
    """The server's use of resources when it is idle and kept-alive connections (5 s) are closed."""
    time.sleep(6)
    deadline = time.monotonic() + 60
    while (state := snapshot(url))["running"]:
        assert time.monotonic() < deadline, "the server does not come to rest"
        time.sleep(0.2)
    return state


def soak(seconds: float, num_clients: int = 8, seed: int = 0, warm_up: float = 0.2) -> dict[str, Any]:
    """Counts of how requests ended, resources after the warm-up and at the end, and memory in between."""
    with served() as url:
        ends = asyncio.run(traffic(url, num_clients, seconds * warm_up, seed))
        before, memory = at_rest(url), []
        num_parts = max(2, min(8, round(seconds / 60)))
        for part in range(1, 1 + num_parts):
            ends += asyncio.run(traffic(url, num_clients, seconds * (1 - warm_up) / num_parts, seed + part))
            memory.append(round(snapshot(url)["memory_mb"]))
        return {"requests": dict(ends), "after_warm_up": before, "memory_mb": memory, "at_the_end": at_rest(url)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = soak(60 * args.minutes, args.clients, args.seed)
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
