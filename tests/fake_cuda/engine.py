"""An engine with a tiny model on the fake device."""

import copy
from dataclasses import replace

import pytest
import torch

from linalign import Prompt
from linalign.alignment_core.decoding import static_sampler
from linalign.alignment_core.execution import static_decodes
from tests.engines import GREEDY, SMALL, aligned, make_engine, tiny_pair

SHORT = replace(GREEDY, max_tokens=6)
WHERE_THE_HOST_WAITS = {"pending_step.py:wait: Event.synchronize"}  # for the previous step; the only place in steps
WHERE_PROBING_WAITS = ("probe.py:", "masking_utils.py:")  # once, before the page pool exists
WHERE_SIZING_WAITS = {"static_sampler.py:draw_everything: tensor"}  # once, before the first request


def several():
    """A prompt with two principles."""
    one, two = (aligned(2.0, extra=extra).principled[0] for extra in (9, 4))
    return Prompt((one, two), (0.25, 0.75), (2.0, 1.0), aligned(2.0).base)


def engine_on(cuda, tokenizer, dtype=torch.float32, model=None, warm_up=False, **config):
    """An engine with a tiny model on the device, and the oracle.

    model: Changes of the model's config.
    warm_up: True captures all graphs at the start, as on a GPU. False captures each on first use (faster).
    """
    changes = {**SMALL, **(model or {})}
    loaded, oracle = tiny_pair(tokenizer, kernels=False, **changes)
    rotary = copy.deepcopy(loaded.model.model.rotary_emb)
    loaded.model.to(dtype)
    loaded.model.model.rotary_emb = rotary  # stays float32, as when a checkpoint is loaded
    cuda.take(loaded.model)
    with pytest.MonkeyPatch.context() as patch:
        if not warm_up:
            for part in (static_sampler.StaticSampler, static_decodes.StaticDecodes):
                patch.setattr(part, "warm_up", lambda _: None)
        sizes = {"num_pages": 100, "max_num_seqs": 4, "num_speculative_tokens": 0}
        engine = make_engine(loaded, **sizes | config)
    places = {place for place in cuda.waits if not place.startswith(WHERE_PROBING_WAITS)}
    assert places <= WHERE_SIZING_WAITS
    cuda.waits.clear()
    cuda.launches.clear()
    return engine, oracle
