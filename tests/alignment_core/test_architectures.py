"""Families of models: those that are served equal the oracle, others are refused."""

import pytest

from alignment_core import model_runner
from alignment_core.attention import native, sdpa
from tests.engines import ARCHITECTURES, GREEDY, judge, make_engine, prompts, run_all, tiny_pair

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(tokenizer, model_type, kernels, monkeypatch):
    """Grouped-query heads everywhere; sliding windows and soft-capping where the model has them."""
    if not kernels:
        monkeypatch.setattr(model_runner, "library", lambda: None)
    loaded, oracle = tiny_pair(tokenizer, model_type, kernels, vocab_size=300, **ARCHITECTURES[model_type])
    for config in ({"num_pages": 400}, {"page_size": 4, "num_pages": 400, "max_num_batched_tokens": 9}):
        engine = make_engine(loaded, **config)
        assert loaded.model.config._attn_implementation == (native.NAME if kernels else sdpa.NAME)
        for prompt, outputs in zip(prompts(), run_all(engine, [(prompt, GREEDY) for prompt in prompts()]), strict=True):
            judge(oracle, prompt, outputs)


def test_attention_in_chunks_is_refused(tokenizer):
    loaded, _ = tiny_pair(tokenizer, vocab_size=300)
    loaded.model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(ValueError, match="chunked_attention"):
        make_engine(loaded, num_pages=10)


def test_an_architecture_that_bypasses_our_attention_is_refused(tokenizer):
    loaded, _ = tiny_pair(tokenizer, "stablelm", vocab_size=300)
    with pytest.raises(ValueError, match="attention interface"):
        make_engine(loaded, num_pages=10)
