"""Engines for tests: tiny models with their oracles, prompts of token ids, and helpers that drive an engine."""

import contextlib
import copy
import time

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from linalign import Engine, EngineConfig, Prompt, SamplingParams
from linalign.alignment_core.cpu.layers import replace_layers
from linalign.alignment_core.loading.loader import LoadedModel
from tests.oracle import Oracle, Setting

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
FEW_WORDS = 8
# Small, because Triton's interpreter is slow. test_paged_triton.py runs the kernels on larger shapes.
SMALL = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
PROGRAMS = 4  # in place of paged_triton.PROGRAMS, so that tests reach both the split and the unsplit kernel
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "smollm3": {},
    "phi3": {},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts_per_tok": 2,
    },
    "phimoe": {"sliding_window": 8, "num_local_experts": 4},
}


def tiny_pair(tokenizer, model_type="llama", kernels=True, **changes):
    """A random float32 model for the engine, and an oracle with the same weights in float64.

    kernels: True for our CPU kernels as the model's layers, False for torch's layers.
    changes: Fields of the model's config that replace the defaults below.
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
        copy.deepcopy(config), dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    judge.load_state_dict(model.state_dict())
    if kernels:
        replace_layers(model, "auto")
    return LoadedModel("tiny", model, tokenizer, 512, frozenset({2})), Oracle(judge)


def make_engine(loaded, **config):
    return Engine(loaded, EngineConfig(**config))


def run_all(engine, requests):
    """Step the engine until every (prompt, params) request is finished. Returns their outputs, in order."""
    outputs = [[] for _ in requests]
    for (prompt, params), collected in zip(requests, outputs, strict=True):
        engine.submit(prompt, params, collected.append)
    while engine.step():
        pass
    return outputs


def token_ids(outputs):
    return [token for output in outputs for token in output.token_ids]


def aligned(ratio, length=30, shift=0, extra=9):
    ids = tuple((7 * i + shift) % 290 + 5 for i in range(length))
    principled = ids[:5] + tuple(range(50, 50 + extra)) + ids[5:]
    return Prompt((principled,), (1.0,), (ratio,), ids if ratio else None)


def prompts():
    return [aligned(ratio, 10 + 11 * i, i) for i, ratio in enumerate([0, 0.5, 2, 5, 0, 2])]


def judge(oracle, prompt, outputs, **setting):
    tokens = token_ids(outputs)
    ties = oracle.check_greedy(prompt, Setting(prompt.ratios, prompt.weights, **setting), tokens)
    assert ties <= 1
    return tokens


@contextlib.contextmanager
def threads(number):
    """Set the number of OpenMP threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
