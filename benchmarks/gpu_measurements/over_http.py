"""Many streams through the server and its load test, compared with the engine alone."""

import asyncio
import socket
import threading
import time
from dataclasses import replace
from typing import Any

from gpu_measurements.bench import GREEDY, RATIO, Bench, finish, forget, start
from gpu_measurements.speed import total_time
from linalign import Principle


def over_http(bench: Bench) -> dict[str, float]:
    """Must be the last measurement of its process, because the server stops the engine when it ends."""
    import uvicorn  # only this measurement needs the server's packages

    from linalign.server.app import create_app
    from linalign.server.commands.bench import BenchSettings, chats
    from linalign.server.commands.bench import bench as load_test
    from linalign.server.local_engine import LocalEngine
    from linalign.server.settings import Settings

    many, reply = bench.shape.many, bench.shape.reply
    settings = BenchSettings(
        requests=many, warmup=0, concurrency=many, prompt_words=bench.shape.prompt, max_tokens=reply,
        principle="w5 " * bench.shape.principle, alignment_ratio=RATIO,
    )  # fmt: skip
    total_time(bench, many, True, max_tokens=4)  # warm-up, for late compilation
    bench.partial["256 without HTTP, tokens/s"] = rate_alone(bench, chats(settings, "random"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(LocalEngine(bench.engine), Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.1)
        settings.url = f"http://127.0.0.1:{port}"
        result = asyncio.run(load_test(settings))
    finally:
        server.should_exit = True
        thread.join()
    assert not result["failures"], result["failures"][:3]
    return bench.partial | {"256 over HTTP, tokens/s": result["tokens_per_s"]}


def rate_alone(bench: Bench, bodies: list[Any]) -> float:
    """Tokens per second of the engine alone for the same requests. Clears the prefix cache before and afterwards."""
    engine = bench.engine
    forget(engine)
    prompts = [engine.prompts.build(b["messages"], [Principle(b["principle"], ratio=RATIO)]) for b in bodies]
    replies = start(engine, prompts, replace(GREEDY, max_tokens=bench.shape.reply, ignore_eos=False))
    seconds = bench.timed(lambda: finish(engine))
    forget(engine)
    return sum(map(len, replies)) / seconds
