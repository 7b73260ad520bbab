"""Builds the loop of an engine and its parts, from a loaded model and a configuration."""

from dataclasses import dataclass

from linalign.alignment_core.decoding.sampler import Sampler
from linalign.alignment_core.decoding.static_sampler import StaticSampler
from linalign.alignment_core.engine_config import EngineConfig
from linalign.alignment_core.execution.model_runner import ModelRunner, RunnerConfig
from linalign.alignment_core.loading.loader import LoadedModel
from linalign.alignment_core.loop import Loop
from linalign.alignment_core.memory import pages_that_fit
from linalign.alignment_core.scheduling.backlog import Backlog
from linalign.alignment_core.scheduling.kv_cache import PagePool
from linalign.alignment_core.scheduling.scheduler import SPECULATIVE_BATCH, Scheduler


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a configuration, with the defaults for a model and its device filled in."""

    max_model_len: int  # tokens
    max_num_batched_tokens: int
    num_speculative_tokens: int
    static: bool  # whether decodes run in fixed shapes

    @classmethod
    def of(cls, config: EngineConfig, loaded: LoadedModel) -> "Sizes":
        """Raises ValueError for invalid sizes."""
        on_cpu = loaded.model.device.type == "cpu"
        sizes = cls(
            max_model_len=config.max_model_len or loaded.max_model_len,
            max_num_batched_tokens=_or(config.max_num_batched_tokens, 128 if on_cpu else 2048),
            num_speculative_tokens=_or(config.num_speculative_tokens, 0 if on_cpu else 8),
            static=not on_cpu if config.static is None else config.static,
        )
        if min(config.max_num_seqs, sizes.max_num_batched_tokens, config.page_size) < 1:
            raise ValueError(f"the sizes must be at least 1: {config}")
        if sizes.max_model_len > loaded.max_model_len:
            raise ValueError(
                f"max_model_len is {sizes.max_model_len}, but the model's context is {loaded.max_model_len}"
            )
        return sizes


def build_loop(loaded: LoadedModel, config: EngineConfig, sizes: Sizes) -> Loop:
    """The loop with its runner, KV cache, scheduler and sampler. Raises ValueError for a model that can't be served."""
    runner = ModelRunner(loaded.model, _runner_config(config, sizes), loaded.followers)
    num_pages = config.num_pages or pages_that_fit(runner, config, sizes.max_model_len, sizes.max_num_batched_tokens)
    runner.allocate(num_pages)
    scheduler = Scheduler(
        PagePool(num_pages, runner.page_size),
        config.max_num_seqs,
        sizes.max_num_batched_tokens,
        sizes.num_speculative_tokens,
    )
    backlog = Backlog(config.max_queued_requests, config.max_queued_tokens, config.max_num_seqs)
    # Followers need every token before the next step, so steps do not overlap.
    overlaps = sizes.static and loaded.followers is None
    return Loop(runner, scheduler, _sampler(runner, sizes.static), backlog, overlaps)


def _runner_config(config: EngineConfig, sizes: Sizes) -> RunnerConfig:
    return RunnerConfig(
        page_size=config.page_size,
        max_model_len=sizes.max_model_len,
        max_rows=config.max_num_seqs + max(config.max_num_seqs, SPECULATIVE_BATCH) if sizes.static else 0,
        kv_cache_dtype=config.kv_cache_dtype,
        batch_invariant=config.batch_invariant,
        eager=config.enforce_eager,
    )


def _sampler(runner: ModelRunner, static: bool) -> Sampler:
    if not static:
        return Sampler()
    sampler = StaticSampler(runner)
    if runner.captures:
        sampler.warm_up()
    return sampler


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
