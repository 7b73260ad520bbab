"""Compares the engine's forward pass with the model's own on a few tokens, so that no family is silently wrong."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linalign.alignment_core.attention.paged_batch import Plan
from linalign.alignment_core.execution.model_runner import ModelRunner, RunnerConfig
from linalign.alignment_core.scheduling.sequence import Branch
from linalign.alignment_core.scheduling.step import Row

log = logging.getLogger(__name__)

NUM_TOKENS, PAGE_SIZE = 16, 4
CHUNKS = ((0, 15), (15, 16))  # a prefill and a decode; each pass reads all weights, so there are only two
WINDOW = 4  # instead of the model's own window, so that few tokens suffice to exceed it
TOLERANCES = {torch.float32: 1e-3}  # of the logits' size, by the model's dtype
# For other dtypes, which round; or thrice the difference of transformers' own attentions, if that is more: at near ties
# other experts may be chosen.
TOLERANCE = 0.1


@torch.inference_mode()
def compare_with_eager(model: PreTrainedModel) -> None:
    """Raises ValueError if the logits differ from those of transformers' eager attention, including windows, or if the
    architecture is not supported.
    """
    config = model.config.get_text_config()
    ids = [(37 * i + 11) % config.vocab_size for i in range(NUM_TOKENS)]
    with _short_window(config):
        ours, theirs = _of_engine(model, ids), _of_transformers(model, ids, "eager")
        tolerance = TOLERANCES.get(model.dtype)
        if tolerance is None:
            with contextlib.suppress(ValueError):  # a model may have no other attention
                tolerance = max(TOLERANCE, 3 * _difference(_of_transformers(model, ids, "sdpa"), theirs))
    if not theirs.isfinite().all():
        log.warning(
            "%s gives no finite logits in %s, so it can't be compared with transformers",
            type(model).__name__,
            model.dtype,
        )
    elif not (difference := _difference(ours, theirs)) < (tolerance or TOLERANCE):
        raise ValueError(
            f"{type(model).__name__} computes something unsupported: the logits differ by {difference:.2g}"
        )


def _of_transformers(model: PreTrainedModel, ids: list[int], attention: str) -> Tensor:
    """Logits at every token, [T, V] float32."""
    model.set_attn_implementation(attention)
    token_ids = torch.tensor([ids], device=model.device)
    logits: Tensor = model(input_ids=token_ids, use_cache=False).logits[0].float()
    return logits


def _difference(a: Tensor, b: Tensor) -> float:
    """The median difference of the tokens, relative to the norm of the logits. a, b: [T, V]."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def _of_engine(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits at every token, [T, V] float32, in chunks over pages."""
    runner = ModelRunner(model, RunnerConfig(page_size=PAGE_SIZE, max_model_len=NUM_TOKENS, eager=True))
    runner.allocate(NUM_TOKENS // PAGE_SIZE)
    branch = Branch(ids, pages=list(reversed(range(NUM_TOKENS // PAGE_SIZE))))
    logits = []
    for start, end in CHUNKS:
        row = Row(branch, start, end)
        plan = Plan.of([row], [(row, place) for place in range(start - end, 0)], PAGE_SIZE)
        logits.append(runner.run(plan).clone())
    return torch.cat(logits)


@contextlib.contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """Shorten the model's window. transformers makes its masks from the configuration at the time of the call."""
    window = getattr(config, "sliding_window", None)
    is_longer = isinstance(window, int) and window > WINDOW
    if is_longer:
        config.sliding_window = WINDOW
    try:
        yield
    finally:
        if is_longer:
            config.sliding_window = window
