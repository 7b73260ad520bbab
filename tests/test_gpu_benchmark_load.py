"""The load of benchmarks/gpu.py: all requests must be running at once before anything is timed."""

import sys
from pathlib import Path

import pytest
import torch

from linalign import Engine, EngineConfig, Prompt
from linalign.alignment_core.attention import sdpa
from linalign.alignment_core.scheduling.sequence import Status

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from gpu_measurements.bench import LARGE, TINY, Bench, random_model, start_decodes

pytestmark = pytest.mark.slow

SHARE = 32  # divisor of the large shape's rows and of the tokens per step; prompts have their full length
MAX_NUM_BATCHED_TOKENS = 2048 // SHARE  # 2048 is the default on a GPU
NUM_ROWS = 2 * LARGE.many // SHARE


@pytest.fixture(scope="module")
def loaded():
    return random_model(TINY.model, torch.float32, torch.device("cpu"))


def engine_of(loaded, max_num_seqs=NUM_ROWS):
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        num_pages=2000,
        num_speculative_tokens=0,
        static=True,
    )
    return Engine(loaded, config)


def load(aligned):
    """Prompts with `NUM_ROWS` branches in total and no common prefix."""
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for _ in range(NUM_ROWS // (1 + aligned)):
        size = (LARGE.principle + LARGE.prompt,)
        ids = torch.randint(10, TINY.model["vocab_size"], size, generator=generator).tolist()
        base = tuple(ids[LARGE.principle :])
        prompts.append(Prompt((tuple(ids),), (1.0,), (2.0,), base) if aligned else Prompt((tuple(ids),)))
    return prompts


@pytest.mark.timeout(120)  # this once looped forever, because the first replies ended before the last ones began
@pytest.mark.parametrize("aligned", [False, True], ids=["plain", "aligned"])
def test_a_load_larger_than_a_step_runs_concurrently(loaded, aligned):
    engine, prompts, max_tokens = engine_of(loaded), load(aligned), 8
    assert sum(len(ids) for prompt in prompts for ids in prompt.branches) > 100 * MAX_NUM_BATCHED_TOKENS
    start_decodes(engine, prompts, max_tokens)
    running = engine.scheduler.running
    assert len(running) == len(prompts)
    assert all(sequence.output_ids and sequence.status is Status.RUNNING for sequence in running)
    for _ in range(max_tokens - 1):  # the number of measured steps
        assert engine.step()
    assert len(running) == len(prompts)
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.timeout(120)
def test_a_load_that_does_not_fit_is_reported(loaded):
    prompts = load(False)
    engine = engine_of(loaded, max_num_seqs=len(prompts) - 1)
    with pytest.raises(RuntimeError, match=f"before all of {len(prompts)} had begun"):
        start_decodes(engine, prompts, 8)
    assert engine.idle


@pytest.mark.parametrize(
    ("part", "left_out"),
    [
        ("graphs", lambda engine: engine.runner.config.eager),
        ("Triton", lambda engine: engine.runner.backend == sdpa.NAME),
    ],
)
def test_an_engine_can_be_made_without_a_feature(part, left_out):
    bench = Bench(tiny=True)
    assert not left_out(bench.new_engine())
    bench.without = part
    assert left_out(bench.new_engine())
