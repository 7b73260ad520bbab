"""Every feature on the device, each in its own measurement; a failed one is retried without parts of the engine."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gpu_measurements.bench import Bench, NotHere, exact_model, finish
from gpu_measurements.features import FEATURES, SCALE, SEED, SHAPE, Feature
from gpu_measurements.parts import without
from linalign import Engine, EngineConfig
from linalign.alignment_core import assembly
from linalign.alignment_core.cpu.layers import replace_layers
from linalign.alignment_core.loading import cuda_quantization
from linalign.alignment_core.loading.loader import LoadedModel
from linalign.alignment_core.scheduling import scheduler

EXPECTED = Path(__file__).with_name("expected.json")


def smoke(bench: Bench, name: str) -> dict[str, Any]:
    """Raises AssertionError if the device's reply differs from the oracle's."""
    feature = FEATURES[name]
    if bench.without in feature.parts_not_used:
        raise NotHere("it does not use that, or does not work without it")
    with contextlib.ExitStack() as stack:
        stack.enter_context(without(bench.without, None if feature.compiled else "compile"))
        if not bench.on_cuda and feature.config.get("kv_cache_dtype"):  # CPU kernels support only float32
            stack.enter_context(without("Triton"))
        for module in (assembly, scheduler):  # fewer sizes to capture
            stack.enter_context(mock.patch.object(module, "SPECULATIVE_BATCH", 8))
        engine = tiny_engine(feature, bench)
        measured = judged(name, feature, engine, bench)
    if bench.without is None:  # a retry may take another code path
        assert feature.took(engine), f"the engine did not do it: {engine.stats()}"
    return measured


def judged(name: str, feature: Feature, engine: Engine, bench: Bench) -> dict[str, Any]:
    expected = json.loads(EXPECTED.read_text())["features"][name]
    measured = {}
    for _ in range(feature.repeat):
        if feature.tolerance is None:
            got = tokens(engine, feature)
            assert got == expected["tokens"], f"{got} instead of {expected['tokens']}"
            continue
        # torchao's rounding has its own oracle; the CPU's rounding has other tests
        rounded = bench.on_cuda and "logprobs of rounded weights" in expected
        wanted = expected["logprobs of rounded weights" if rounded else "logprobs"]
        error = mean_difference(engine, feature, expected["tokens"], wanted)
        tolerance = feature.tolerance if bench.on_cuda else feature.tolerance_on_cpu or feature.tolerance
        measured[f"{name}, nats off"] = error
        assert error <= tolerance, f"log-probabilities are off by {error} nats"
    assert engine.pool.num_free == engine.pool.num_pages
    return measured


def tiny_engine(feature: Feature, bench: Bench) -> Engine:
    dtype = getattr(torch, feature.model.get("dtype", "float32")) if bench.on_cuda else torch.float32
    loaded = exact_model(SHAPE, dtype, bench.device, SCALE, SEED)
    quantise(loaded, feature.model.get("quantization"), bench)
    config = {
        "num_pages": 400, "max_num_seqs": 8, "max_model_len": 512, "max_num_batched_tokens": 2048,
        "num_speculative_tokens": 0, "static": True,
    }  # fmt: skip
    return Engine(loaded, EngineConfig(**config | feature.config))


def quantise(loaded: LoadedModel, quantization: str | None, bench: Bench) -> None:
    if quantization is None:
        return
    if bench.on_cuda:
        cuda_quantization.quantise(loaded.model, quantization)
    elif quantization == "fp8":
        raise NotHere("a CPU has no weights in fp8")
    else:
        replace_layers(loaded.model, quantization)


def tokens(engine: Engine, feature: Feature) -> list[list[int]]:
    """The engine's replies to all requests: one per choice."""
    replies: list[list[int]] = []
    for prompt, params in feature.requests:
        choices: list[list[int]] = [[] for _ in range(feature.n)]
        replies += choices

        def collect(output: Any, choices: list[list[int]] = choices) -> None:
            assert output.error is None, output.error
            choices[output.choice] += output.token_ids

        engine.submit(prompt, params, collect, feature.n)
    finish(engine)
    return replies


def mean_difference(engine: Engine, feature: Feature, replies: list[list[int]], logprobs: list[list[float]]) -> float:
    """Mean difference, in nats, between the engine's log-probabilities of the given `replies` and `logprobs`."""
    seen: list[list[float]] = []
    for (prompt, params), given in zip(feature.requests, replies, strict=True):
        reply_logprobs: list[float] = []
        seen.append(reply_logprobs)
        prompt = replace(prompt, given=tuple(given))
        params = replace(params, max_tokens=1, logprobs=0)
        engine.submit(prompt, params, lambda out, reply=reply_logprobs: reply.extend(t.logprob for t in out.logprobs))  # type: ignore[misc]
    finish(engine)
    pairs = [
        (a, b)
        for reply_logprobs, wanted in zip(seen, logprobs, strict=True)
        for a, b in zip(reply_logprobs[: len(wanted)], wanted, strict=True)
    ]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
