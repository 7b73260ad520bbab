"""Each feature of the engine on a tiny model, with the expected result: tokens of the float64 oracle."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gpu_measurements.bench import GREEDY
from linalign import Engine, Prompt, SamplingParams
from linalign.alignment_core.request import Structure

SEED, SCALE = 1, 0.35
SHAPE = {  # divisible by int4's groups of 128
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHORT = replace(GREEDY, max_tokens=12)


@dataclass(frozen=True)
class Feature:
    """A feature and its test."""

    requests: tuple[tuple[Prompt, SamplingParams], ...]
    config: dict[str, Any] = field(default_factory=dict)  # of the engine
    setting: dict[str, Any] = field(default_factory=dict)  # of the oracle, for all requests
    # None: tokens must equal the oracle's. Otherwise the oracle's tokens are given, and their log-probabilities may
    # differ by this many nats on average (on a CPU, which rounds differently, by tolerance_on_cpu).
    tolerance: float | None = None
    tolerance_on_cpu: float | None = None
    model: dict[str, str] = field(default_factory=dict)  # dtype and quantization
    took: Callable[[Engine], bool] = lambda _: True  # whether the engine used the tested code path
    compiled: bool = False  # with torch.compile, which takes a minute and is independent of other features
    n: int = 1
    repeat: int = 1

    @property
    def parts_not_used(self) -> tuple[str, ...]:
        """Parts of the engine that a retry does not leave out: the feature does not use them, or needs them."""
        compiles = () if self.compiled else ("compile",)
        captures = ("graphs",) if self.config.get("enforce_eager") else ()
        needs = ("Triton",) if self.config.get("batch_invariant") else ()
        return (*compiles, *captures, *needs)


def prompt(ratio: float, length: int = 40, shift: int = 0, extra: int = 9, method: Any = "linear") -> Prompt:
    ids = tuple((7 * i * i + 11 * i + shift) % 240 + 10 for i in range(length))
    principled = ids[:5] + tuple(range(50, 50 + extra)) + ids[5:]
    return Prompt((principled,), (1.0,), (ratio,), ids if ratio else None, method=method)


def two_principles() -> Prompt:
    one, two = (prompt(2.0, extra=extra).principled[0] for extra in (9, 4))
    return Prompt((one, two), (0.25, 0.75), (2.0, 1.0), prompt(2.0).base)


PAIR = ((prompt(2.0), SHORT), (prompt(0, 33, 3), SHORT))
LONG = tuple((prompt(ratio, 60 + 7 * i, i), SHORT) for i, ratio in enumerate((0, 0.5, 2.0, 5.0)))
DRAWN = replace(SHORT, temperature=0.8, seed=5)
PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
PLAIN = ((prompt(0, 50), SHORT), (prompt(0, 33, 3), SHORT))


def replayed(engine: Engine) -> bool:
    return engine.runner.graphs.num_runs > 5 and (len(engine.runner.graphs) > 0 or not engine.runner.captures)


FEATURES = {
    "prefill": Feature(((prompt(2.0, 100), replace(SHORT, max_tokens=1)),), {"max_num_batched_tokens": 32}),
    "eager decodes": Feature(PAIR, {"enforce_eager": True}),
    "decodes in graphs": Feature(PAIR, took=replayed),
    "mixed batch": Feature(LONG, {"max_num_batched_tokens": 64}, took=replayed),
    "several principles": Feature(((two_principles(), SHORT), *PAIR)),
    "penalties": Feature(
        tuple((p, replace(SHORT, **PENALTIES)) for p in (prompt(2.0), prompt(0, 33, 4))),
        setting={"presence": 1.5, "frequency": 0.5, "repetition": 1.2},
    ),
    "logit bias": Feature(
        tuple((p, replace(q, logit_bias={77: 100.0, 78: 99.0})) for p, q in PAIR),
        setting={"bias": ((77, 100.0), (78, 99.0))},
    ),
    "structured output": Feature(
        ((prompt(2.0), replace(SHORT, structure=Structure("choice", '["yeartime", "schoollife"]'))),),
        setting={"allowed": {(): [11, 21], (11,): [10], (21,): [18]}},  # token ids that may follow each reply
    ),
    "adaptive": Feature(((prompt(20.0, method="adaptive"), SHORT),), setting={"method": "adaptive", "scale": 50.0}),
    "opad": Feature(((prompt(2.0, method="opad"), SHORT),), setting={"method": "opad", "top_p": 1.0}),
    "away": Feature(((prompt(-3.0), SHORT),)),
    "drafts": Feature(  # biased to few words, so that n-grams repeat
        ((prompt(2.0), replace(SHORT, max_tokens=40, logit_bias=dict.fromkeys((71, 72, 73), 60.0))),),
        {"num_speculative_tokens": 8},
        {"bias": ((71, 60.0), (72, 60.0), (73, 60.0))},
        took=lambda engine: engine.stats().num_tokens_accepted > 0,
    ),
    "preemption": Feature(
        LONG,
        {"page_size": 8, "num_pages": 42, "max_num_batched_tokens": 128},
        took=lambda engine: engine.stats().num_preemptions > 0,
    ),
    "prefix hits": Feature(PAIR, repeat=2, took=lambda engine: engine.stats().num_tokens_cached >= 64),
    "batch-invariant": Feature(LONG, {"batch_invariant": True}),
    "seeds": Feature(tuple((p, DRAWN) for p, _ in PAIR), setting={"drawn": True}),
    "filters": Feature(tuple((p, replace(DRAWN, top_k=20, top_p=0.9)) for p, _ in PAIR), setting={"drawn": True}),
    "n = 4": Feature(((prompt(2.0), DRAWN),), setting={"drawn": True}, n=4),
    "log-probabilities": Feature(PLAIN, tolerance=1e-3),
    "keys in bfloat16": Feature(PLAIN, {"kv_cache_dtype": "bfloat16"}, tolerance=0.05),
    "keys in float16": Feature(PLAIN, {"kv_cache_dtype": "float16"}, tolerance=0.01),
    "keys in fp8": Feature(PLAIN, {"kv_cache_dtype": "fp8"}, tolerance=0.5),
    "bfloat16": Feature(PLAIN, tolerance=0.1, model={"dtype": "bfloat16"}),
    "int8": Feature(PLAIN, tolerance=0.15, tolerance_on_cpu=0.2, model={"dtype": "bfloat16", "quantization": "int8"}),
    "int4": Feature(PLAIN, tolerance=0.15, tolerance_on_cpu=1.5, model={"dtype": "bfloat16", "quantization": "int4"}),
    "fp8": Feature(PLAIN, tolerance=0.4, model={"dtype": "bfloat16", "quantization": "fp8"}),
    "compiled": Feature(PAIR, compiled=True, took=replayed),  # measured separately, because it takes longest
}
