import copy
import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, as torch does

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from alignment_core import Engine, EngineConfig, load
from alignment_core.cpu.layers import replace_layers
from alignment_core.loading import LoadedModel
from tests.oracle import Oracle

pytest_plugins = ["tests.serving"]


@pytest.fixture(scope="session")
def embedded():
    return load()


@pytest.fixture(scope="session")
def tokenizer(embedded):
    return embedded.tokenizer


@pytest.fixture(scope="session")
def embedded_oracle(embedded):
    path = embedded.model.config._name_or_path
    return Oracle(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval())


def tiny_pair(tokenizer, model_type="llama", kernels=True, **changes):
    """A random model for the engine, and an oracle with the same weights in float64.

    kernels: whether the model's layers are our CPU kernels or torch's.
    """
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **changes,
    }
    config = CONFIG_MAPPING[model_type](**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    judge = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float64, attn_implementation="eager"
    ).eval()
    judge.load_state_dict(model.state_dict())
    if kernels:
        replace_layers(model, "auto")
    return LoadedModel("tiny", model, tokenizer, 512, frozenset({2})), Oracle(judge)


@pytest.fixture(scope="session")
def tiny(tokenizer):
    return tiny_pair(tokenizer, vocab_size=300)


FEW_WORDS = 8


@pytest.fixture(scope="session")
def few_words(tokenizer):
    """A model of so small a vocabulary that n-grams come again, sometimes with what followed them before."""
    return tiny_pair(tokenizer, vocab_size=FEW_WORDS)


def run_all(engine, requests):
    """Drive the engine by hand until every (prompt, params) is answered; their outputs in order."""
    outputs = [[] for _ in requests]
    for (prompt, params), collected in zip(requests, outputs, strict=True):
        engine.submit(prompt, params, collected.append)
    while engine.step():
        pass
    return outputs


def token_ids(outputs):
    return [token for output in outputs for token in output.token_ids]


def make_engine(loaded, **config):
    return Engine(loaded, EngineConfig(**config))
