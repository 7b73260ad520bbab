"""Model families: supported ones equal the oracle, others are refused."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.llama import modeling_llama

from linalign.alignment_core.attention import sdpa
from linalign.alignment_core.attention.probe import probe
from linalign.alignment_core.cpu import attention as cpu_attention
from linalign.alignment_core.cpu.layers import replace_layers
from linalign.alignment_core.execution import model_runner
from linalign.alignment_core.loading.eager_check import compare_with_eager
from tests.engines import ARCHITECTURES, GREEDY, judge, make_engine, prompts, run_all, tiny_pair

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(tokenizer, model_type, kernels, monkeypatch):
    """All models have grouped-query heads; some have sliding windows or soft-capping."""
    if not kernels:
        monkeypatch.setattr(model_runner, "library", lambda: None)
    loaded, oracle = tiny_pair(tokenizer, model_type, kernels, vocab_size=300, **ARCHITECTURES[model_type])
    for config in ({"num_pages": 400}, {"page_size": 4, "num_pages": 400, "max_num_batched_tokens": 9}):
        engine = make_engine(loaded, **config)
        assert loaded.model.config._attn_implementation == (cpu_attention.NAME if kernels else sdpa.NAME)
        for prompt, outputs in zip(prompts(), run_all(engine, [(prompt, GREEDY) for prompt in prompts()]), strict=True):
            judge(oracle, prompt, outputs)


def test_attention_in_chunks_is_refused(tokenizer):
    loaded, _ = tiny_pair(tokenizer, vocab_size=300)
    loaded.model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(ValueError, match="chunked_attention"):
        make_engine(loaded, num_pages=10)


def test_an_architecture_that_bypasses_our_attention_is_refused(tokenizer):
    loaded, _ = tiny_pair(tokenizer, "stablelm", kernels=False, vocab_size=300)
    for serve in (
        compare_with_eager,
        partial(replace_layers, quantization="auto"),
        lambda _: make_engine(loaded, num_pages=10),
    ):
        with pytest.raises(ValueError, match="attention interface"):
            serve(loaded.model)


def test_a_window_that_only_the_mask_has(tokenizer):
    """These families pass no window to their attention; test_pairs.py tests what follows from that."""
    for model_type, windows in {"qwen2_moe": [8, None, None], "phimoe": [8, 8, 8], "qwen2": [None, 8, 8]}.items():
        loaded, _ = tiny_pair(tokenizer, model_type, kernels=False, vocab_size=300, **ARCHITECTURES[model_type])
        assert [layer.window for _, layer in sorted(probe(loaded.model, 512, paged=None).items())] == windows
        assert [layer.window for _, layer in sorted(probe(loaded.model, 7, paged=None).items())] == [None] * 3


class Masked(LlamaForCausalLM):
    """Llama with masks made by `how` instead of transformers' function."""

    how = None

    def forward(self, *args, **kwargs):
        with mock.patch.object(modeling_llama, "create_causal_mask", self.how):
            return super().forward(*args, **kwargs)


def in_chunks(**kwargs):
    kwargs["config"].attention_chunk_size = 8
    return create_chunked_causal_mask(**kwargs)


def both_ways(**kwargs):
    return create_causal_mask(**kwargs, or_mask_function=lambda *places: places[-1] < 5)


def sinks(**kwargs):
    kwargs["config"].sliding_window = 8
    return create_sliding_window_causal_mask(**kwargs, or_mask_function=lambda *places: places[-1] < 1)


def own_masks(**kwargs):
    return torch.zeros(1, 1, *[kwargs["inputs_embeds"].shape[1]] * 2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (in_chunks, "sliding windows"),
        (both_ways, "sliding windows"),
        (sinks, "sliding windows"),
        (own_masks, "its own attention masks"),
    ],
)
def test_a_mask_that_is_not_a_window_is_refused(tokenizer, how, message):
    loaded, _ = tiny_pair(tokenizer, kernels=False, vocab_size=300)
    loaded.model.__class__ = type("Masked", (Masked,), {"how": staticmethod(how)})
    with pytest.raises(ValueError, match=f"Masked .*{message}"):
        make_engine(loaded, num_pages=10)


def test_a_family_that_the_engine_computes_differently_is_refused(tokenizer, monkeypatch):
    """Whatever the difference is: here the backend gets another window, scale or soft-cap than the model has."""
    loaded, _ = tiny_pair(tokenizer, "qwen2_moe", kernels=False, vocab_size=300, **ARCHITECTURES["qwen2_moe"])
    compare_with_eager(loaded.model)
    assert loaded.model.config.sliding_window == 8
    for change in ({"window": None}, {"scaling": 0.2}, {"softcap": 5.0}):
        monkeypatch.setattr(
            model_runner,
            "probe",
            lambda *args, change=change, **kwargs: {
                number: replace(layer, **change) for number, layer in probe(*args, **kwargs).items()
            },
        )
        with pytest.raises(ValueError, match="computes something unsupported"):
            compare_with_eager(loaded.model)


@pytest.mark.parametrize("model_type", ["mixtral", "phimoe"])
def test_differences_by_rounding_are_accepted(tokenizer, model_type):
    """In 16 bits, near ties can change which experts are chosen. The comparison must allow for that."""
    shape = {"num_hidden_layers": 12, "initializer_range": 0.1, "num_local_experts": 8}
    loaded, _ = tiny_pair(tokenizer, model_type, kernels=False, vocab_size=300, **shape)
    compare_with_eager(loaded.model.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_without_finite_logits_is_served_with_a_warning(tokenizer, dtype, caplog):
    """The model is loaded, but a reply whose logits are not finite ends with an error."""
    loaded, _ = tiny_pair(tokenizer, kernels=False, vocab_size=300)
    with torch.inference_mode():
        loaded.model.lm_head.weight[7] = torch.nan
    compare_with_eager(loaded.model.to(dtype))
    assert f"no finite logits in {dtype}, so it can't be compared" in caplog.text
