"""Random mixed traffic with random aborts against a real server: is everything as before when it is over?

    python benchmarks/soak.py [--minutes 20] [--clients 8] [--seed 0] [--output FILE]

A fifth of the time is warm-up. Then, and at the end, the server is let come to rest and looked at: resident memory,
pages, tasks of the event loop, threads, open files. Every request must end as it should: with a whole reply, with the
refusal that it asks for, or because its client left.
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

from linalign.server.bench import WORDS

NUM_PAGES = 600
# A small KV cache, all of it in memory from the start, and counts that only the process itself knows.
SERVER = f"""
NUM_PAGES = {NUM_PAGES}
import asyncio, threading
import torch
from linalign.alignment_core import engine
from linalign.alignment_core.execution import model_runner
from linalign.server import metrics
from prometheus_client.core import GaugeMetricFamily
engine.pages_that_fit = lambda *_: NUM_PAGES
model_runner._zeros = lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device)
collect = metrics.EngineCollector.collect
def with_more(self):
    yield from collect(self)
    yield GaugeMetricFamily("soak_tasks", "", len(asyncio.all_tasks()))
    yield GaugeMetricFamily("soak_threads", "", threading.active_count())
metrics.EngineCollector.collect = with_more
from linalign.server.cli import main; main()
"""
METHODS = ("linear", "cfg", "amulet", "adaptive", "opad")
EDITS: list[dict[str, Any]] = [{"stop": ["e", "xyz"]}, {"presence_penalty": 1}, {"ignore_eos": True}]
EDITS += [{"logit_bias": {"5": 3}}, {"repetition_penalty": 1.2}, {"min_tokens": 1}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
LEFT, DONE, REFUSED = "left", "done", "refused"


@contextlib.contextmanager
def served() -> Iterator[str]:
    """A server of its own, that must end in order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # glibc's malloc makes arenas for threads that come and go, whose growth would hide a leak.
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


def text(dice: random.Random, most: int) -> str:
    return " ".join(dice.choices(WORDS, k=dice.randint(1, most)))


def request(dice: random.Random) -> tuple[str, dict[str, Any], int]:
    """A path, a body, and the status that it deserves."""
    body: dict[str, Any] = {"model": "smollm2", "temperature": dice.choice([0, 0.7, 1.5]), "seed": dice.randint(0, 99)}
    if dice.random() < 0.7:
        principle: Any = text(dice, 8)
        if dice.random() < 0.2:
            principle = [{"text": text(dice, 8), "ratio": dice.uniform(-2, 5)} for _ in range(dice.randint(1, 3))]
        body |= {
            "principle": principle,
            "alignment_method": dice.choice(["linear", "cfg", "amulet", "adaptive", "opad"]),
        }
    most = dice.choice([1, 8, 24, 60])
    kind = dice.choice(["chat", "chat", "chat", "text", "responses", "tokenize", "bad"])
    if kind == "tokenize":
        return "/tokenize", {"model": "smollm2", "prompt": text(dice, 300)}, 200
    if kind == "bad":
        wrong = dice.choice([{"max_tokens": "x"}, {"unknown": 1}, {"max_tokens": 10**6}, {"alignment_ratio": 99}])
        return "/v1/completions", body | {"prompt": text(dice, 5)} | wrong, 400
    body["stream"] = dice.random() < 0.6
    if kind == "responses":
        return "/v1/responses", body | {"input": text(dice, 60), "max_output_tokens": most}, 200
    body |= {"max_tokens": most, "n": dice.choice([1, 1, 1, 2])}
    body |= dice.choice(
        [{}, {}, {"stop": ["e", "xyz"]}, {"presence_penalty": 1}, {"ignore_eos": True}, {"logit_bias": {"5": 3}}]
    )
    if kind == "text":
        prompts = [text(dice, 100) for _ in range(dice.choice([1, 1, 3]))]
        return "/v1/completions", body | {"prompt": prompts, "logprobs": dice.choice([None, 3])}, 200
    turns = [{"role": "user", "content": text(dice, dice.choice([10, 10, 400]))}]
    extras: list[dict[str, Any]] = [{}, {}, {"logprobs": True, "top_logprobs": 5}, {"alignment_trace": True}]
    extras += [{"tools": [TOOL], "tool_choice": "required", "max_tokens": 60}]
    extras += [{"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}]
    return "/v1/chat/completions", body | {"messages": turns} | dice.choice(extras), 200


async def ask(client: httpx.AsyncClient, dice: random.Random) -> str:
    """How one request ended. Anything that should not be is an AssertionError."""
    path, body, status = request(dice)
    leaves_after = dice.choice([None, None, dice.randint(0, 20)])  # lines
    patience = dice.choice([None, None, None, dice.uniform(0, 0.5)])  # seconds

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
        dice = random.Random(seed * 1000 + number)
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            while time.monotonic() < deadline:
                ends[await ask(client, dice)] += 1

    await asyncio.gather(*(one(number) for number in range(num_clients)))
    return ends


def seen(url: str) -> dict[str, float]:
    """What the server holds at this moment."""
    metrics = httpx.get(url + "/metrics", headers={"Connection": "close"}, timeout=60).raise_for_status().text
    found = {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", metrics, re.MULTILINE)}
    return {
        "running": found["linalign:num_requests_running"] + found["linalign:num_requests_waiting"],
        "memory_mb": found["process_resident_memory_bytes"] / 1e6,
        "open_files": found["process_open_fds"],
        "tasks": found["soak_tasks"],
        "threads": found["soak_threads"],
        "free_pages": NUM_PAGES * (1 - found["linalign:kv_cache_usage_perc"]),
    }


def at_rest(url: str) -> dict[str, float]:
    """What it holds once nothing runs any more and connections that were kept, for 5 s, have ended."""
    time.sleep(6)
    deadline = time.monotonic() + 60
    while (found := seen(url))["running"]:
        assert time.monotonic() < deadline, "the server does not come to rest"
        time.sleep(0.2)
    return found


def soak(seconds: float, num_clients: int = 8, seed: int = 0, warm_up: float = 0.2) -> dict[str, Any]:
    """Ends of requests, what the server held after the warm-up and at the end, and its memory on the way."""
    with served() as url:
        ends = asyncio.run(traffic(url, num_clients, seconds * warm_up, seed))
        before, memory = at_rest(url), []
        num_parts = max(2, min(8, round(seconds / 60)))
        for part in range(1, 1 + num_parts):
            ends += asyncio.run(traffic(url, num_clients, seconds * (1 - warm_up) / num_parts, seed + part))
            memory.append(round(seen(url)["memory_mb"]))
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
