"""Every feature on the device, each in its own measurement; what fails is tried again without a part of the engine."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignment_core import (
    Engine,
    EngineConfig,
    cuda_graphs,
    cuda_quantization,
    model_runner,
    static_draw,
    static_sampling,
)
from alignment_core.attention import sdpa
from alignment_core.cpu.layers import replace_layers
from alignment_core.loading import LoadedModel
from gpu_measurements.bench import Bench, exact_model, finish
from gpu_measurements.features import FEATURES, SCALE, SEED, SHAPE, Feature

EXPECTED = Path(__file__).with_name("expected.json")
PARTS = ("graphs", "compile", "Triton")  # of the engine, which a retry leaves out


def leave_out(part: str) -> None:
    """For the rest of this process."""
    if part == "graphs":
        cuda_graphs.Graphs.run = _run_without_graph  # type: ignore[method-assign]
    elif part == "compile":
        model_runner.compile_layers = lambda *_: None
        static_sampling.compiled_draw = lambda *_: static_draw.draw
    elif part == "Triton":
        model_runner._choose_backend = lambda _: sdpa.NAME


def _run_without_graph(graphs: cuda_graphs.Graphs, _: object, function: Any) -> None:
    graphs.num_runs += 1
    function()


def smoke(name: str, bench: Bench) -> dict[str, Any]:
    """Raises AssertionError where the device replies other than the oracle."""
    feature = FEATURES[name]
    engine = tiny_engine(feature, bench)
    expected = json.loads(EXPECTED.read_text())["features"][name]
    for _ in range(feature.repeat):
        if feature.tolerance is None:
            got = tokens(engine, feature)
            assert got == expected["tokens"], f"{got} instead of {expected['tokens']}"
            off = None
        else:
            off = mean_difference(engine, feature, expected)
            assert off <= feature.tolerance, f"log-probabilities are off by {off} nats"
    assert feature.took(engine), f"the engine did not do it: {engine.stats()}"
    assert engine.pool.num_free == engine.pool.num_pages
    return {} if off is None else {f"{name}, nats off": off}


def tiny_engine(feature: Feature, bench: Bench) -> Engine:
    dtype = getattr(torch, feature.model.get("dtype", "float32")) if bench.on_cuda else torch.float32
    loaded = exact_model(SHAPE, dtype, bench.device, SCALE, SEED)
    quantise(loaded, feature.model.get("quantization"), bench)
    config = {"num_pages": 400, "max_num_seqs": 8, "max_model_len": 512, "num_speculative_tokens": 0, "static": True}
    if not bench.on_cuda and feature.config.get("kv_cache_dtype"):
        model_runner._choose_backend = lambda _: sdpa.NAME  # a CPU's kernels have float32 alone
    return Engine(loaded, EngineConfig(**config | feature.config))


def quantise(loaded: LoadedModel, quantization: str | None, bench: Bench) -> None:
    if quantization is None:
        return
    if bench.on_cuda:
        cuda_quantization.quantise(loaded.model, quantization)
    elif quantization == "fp8":
        raise NotImplementedError("a CPU has no weights in fp8")
    else:
        replace_layers(loaded.model, quantization)


def tokens(engine: Engine, feature: Feature) -> list[list[int]]:
    """What the engine replies to each request, and of each choice."""
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


def mean_difference(engine: Engine, feature: Feature, expected: dict[str, Any]) -> float:
    """Of the log-probabilities of the oracle's tokens, which the engine is given."""
    seen: list[list[float]] = []
    for (prompt, params), given in zip(feature.requests, expected["tokens"], strict=True):
        mine: list[float] = []
        seen.append(mine)
        prompt = replace(prompt, given=tuple(given))
        params = replace(params, max_tokens=1, logprobs=0)
        engine.submit(prompt, params, lambda out, mine=mine: mine.extend(t.logprob for t in out.logprobs))  # type: ignore[misc]
    finish(engine)
    pairs = [
        (a, b)
        for mine, wanted in zip(seen, expected["logprobs"], strict=True)
        for a, b in zip(mine[: len(wanted)], wanted, strict=True)
    ]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


SMOKE = {name: partial(smoke, name) for name in FEATURES}
