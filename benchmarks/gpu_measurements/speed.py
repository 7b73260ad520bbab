"""The engine with the large model: 1, 64 and 256 requests, and a profile of steps."""

import statistics
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_measurements.bench import GREEDY, Bench, drop, finish, forget, start, start_decodes
from linalign.alignment_core.scheduling.sequence import NextToken

PROFILED_STEPS = 8
TOP = 20  # kernels


def engine_start(bench: Bench) -> dict[str, Any]:
    """Start the engine that later measurements share: weights, KV cache, compiled layers and draws, CUDA graphs.

    The copy bandwidth, which bounds decode steps, is measured before the KV cache takes all memory.
    """
    bench.partial["free memory before, bytes"] = torch.cuda.mem_get_info()[0] if bench.on_cuda else None
    weights = bench.timed(lambda: bench.loaded)
    copied = bandwidth(bench)
    bench.tidy()
    engine_seconds = bench.timed(lambda: bench.engine)
    engine = bench.engine
    model = bench.loaded.model
    read = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    return bench.partial | {
        "making the weights, s": weights,
        "copy bandwidth, bytes/s": copied,
        "engine start, s": engine_seconds,
        "bytes of weights that a step reads": read,
        "CUDA graphs": len(engine.runner.graphs),
        "attention": engine.runner.backend,
        "pages of the KV cache": engine.pool.num_pages,
    }


def one(bench: Bench) -> dict[str, float]:
    """Decode steps of one request."""
    decode_time(bench, 1, True)  # warm-up, for late compilation
    for name, aligned in (("plain", False), ("aligned", True)):
        bench.partial[f"1 {name}, s a step"] = bench.median(lambda aligned=aligned: decode_time(bench, 1, aligned))  # type: ignore[misc]
    return bench.partial


def some(bench: Bench) -> dict[str, float]:
    """Time from the first prefill to the last token of 64 requests."""
    number = bench.shape.some
    total_time(bench, number, True, max_tokens=4)
    preemptions = bench.engine.stats().num_preemptions
    for name, aligned in (("plain", False), ("aligned", True)):
        bench.partial[f"64 {name}, s"] = bench.median(lambda aligned=aligned: total_time(bench, number, aligned))  # type: ignore[misc]
    return bench.partial | {
        "row tokens of 64 aligned": 2 * number * bench.shape.reply,
        "preemptions of 64": bench.engine.stats().num_preemptions - preemptions,
    }


def many(bench: Bench) -> dict[str, float]:
    """The same for 256 aligned requests, and for 512 plain ones, which have the same number of rows."""
    number = bench.shape.many
    total_time(bench, number, True, max_tokens=4)
    preemptions = bench.engine.stats().num_preemptions
    found = bench.partial
    found["256 aligned, s"] = total_time(bench, number, True)
    found["512 plain, s"] = total_time(bench, 2 * number, False)
    found["preemptions of 256 and 512"] = bench.engine.stats().num_preemptions - preemptions
    found["256 aligned, s a step"] = decode_time(bench, number, True, max_tokens=32)
    found["draw of 256, s"] = draw_time(bench)
    return found


def profile_one(bench: Bench) -> dict[str, Any]:
    return {"profile of 1 aligned": profiled(bench, 1)}


def profile_some(bench: Bench) -> dict[str, Any]:
    return {"profile of 64 aligned": profiled(bench, bench.shape.some)}


def profiled(bench: Bench, sequences: int) -> dict[str, Any]:
    """A profile of decode steps: the kernels that take most time, and the time without any kernel."""
    engine = bench.engine
    forget(engine)
    start_decodes(engine, [bench.prompt(i, True) for i in range(sequences)], PROFILED_STEPS + 8)
    engine.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_cuda else [])]
    with profile(activities=activities) as profiler:

        def steps() -> None:
            for _ in range(PROFILED_STEPS):
                engine.step()

        seconds = bench.timed(steps)
    drop(engine)
    kind = DeviceType.CUDA if bench.on_cuda else DeviceType.CPU
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == kind:
            time_us = event.device_time_total if bench.on_cuda else event.self_cpu_time_total
            kernels.setdefault(event.name, []).append(time_us)
    busiest = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    busy = sum(map(sum, kernels.values())) / 1e6
    return {
        "s a step": seconds / PROFILED_STEPS,
        "s a step in kernels": busy / PROFILED_STEPS,
        "s a step without a kernel": max(0.0, seconds - busy) / PROFILED_STEPS,
        "kernels": [
            {"name": name[:120], "us a step": sum(times) / PROFILED_STEPS, "calls a step": len(times) / PROFILED_STEPS}
            for name, times in busiest[:TOP]
        ],
        "share of the kernels listed": sum(sum(times) for _, times in busiest[:TOP]) / 1e6 / busy if busy else None,
    }


def bandwidth(bench: Bench) -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    source = torch.randn(1 << (29 if bench.on_cuda else 22), device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(bench.timed(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.nbytes / seconds


def decode_time(bench: Bench, sequences: int, aligned: bool, max_tokens: int | None = None) -> float:
    """Seconds per decode step, without prefill."""
    engine = bench.engine
    forget(engine)
    steps = max_tokens or bench.shape.reply
    start_decodes(engine, [bench.prompt(i, aligned) for i in range(sequences)], steps + 8)

    def run() -> None:
        for _ in range(steps):
            engine.step()

    seconds = bench.timed(run)
    assert len(engine.scheduler.running) == sequences, "sequences have ended meanwhile"
    drop(engine)
    return seconds / steps


def total_time(bench: Bench, sequences: int, aligned: bool, max_tokens: int | None = None) -> float:
    """Seconds from the first prefill to the last token."""
    forget(bench.engine)
    params = replace(GREEDY, max_tokens=max_tokens or bench.shape.reply)
    replies = start(bench.engine, [bench.prompt(i, aligned) for i in range(sequences)], params)
    seconds = bench.timed(lambda: finish(bench.engine))
    assert all(len(reply) == params.max_tokens for reply in replies), "some requests failed"
    return seconds


def draw_time(bench: Bench) -> float:
    """Seconds on the device for mixing, plausible set and draw at temperature 1, for many sequences."""
    engine = bench.engine
    sequences: list[Any] = []
    with mock.patch.object(engine.scheduler, "add", sequences.append):
        params = replace(GREEDY, temperature=1.0, max_tokens=1)
        start(engine, [bench.prompt(i, True) for i in range(bench.shape.many)], params)
        engine._empty_inbox()
    engine.loop.requests.clear()
    logits = engine.runner.logits.normal_(0, 3)[: 2 * len(sequences)]
    run = engine.runner.graphs.run
    with mock.patch.object(engine.runner.graphs, "run", wraps=run) as spy:
        engine.loop.sampler.draw(logits, [NextToken(sequence, 0) for sequence in sequences])
    ((name, function),) = [call.args for call in spy.call_args_list]

    def again() -> None:
        with torch.inference_mode():
            for _ in range(10):
                run(name, function)

    return statistics.median(bench.timed(again) for _ in range(5)) / 10
