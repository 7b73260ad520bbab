"""The CPU kernels: storage formats, results, which layers use them, and the fallback without a compiler."""

import os
import platform

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from linalign import load
from linalign.alignment_core.cpu.layers import PackedLinear, num_fused_layers, replace_layers
from linalign.alignment_core.cpu.packing import pack
from tests import fork_server
from tests.engines import make_engine, run_all, threads, tiny_pair
from tests.test_readme import reply

pytestmark = pytest.mark.slow

GGUF_TYPES = {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8", "F16": "float32", "BF16": "bfloat16"}


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_quantised_blocks_of_a_checkpoint_are_recovered_exactly(name):
    """Weights that the gguf package quantised are packed in the smallest lossless format and read back bit-equal."""
    kind = gguf.GGMLQuantizationType[name]
    original = np.random.default_rng(0).standard_normal((48, 96), np.float32)
    weights = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind).reshape(48, 96))
    packed = pack(weights, None, "auto")
    assert packed.format == GGUF_TYPES[name]
    assert torch.equal(weights_in(packed), weights)


def test_one_weight_off_the_grid_keeps_the_matrix_unpacked():
    weights = rounded(torch.randn(40, 64), "int4")
    assert pack(weights, None, "auto").format == "int4"
    weights[39, 63] += 1e-3
    packed = pack(weights, None, "auto")
    assert packed.format == "float32"
    assert torch.equal(weights_in(packed), weights)


@pytest.mark.parametrize(("quantization", "steps"), [("int8", 127), ("int4", 7.5)])
def test_rounding_is_within_half_a_step(quantization, steps):
    weights = torch.randn(64, 128)
    packed = pack(weights, None, quantization)
    assert packed.format == quantization
    error = (weights_in(packed) - weights).abs().view(64, -1, 32)
    assert (error.amax(-1) <= weights.abs().view(64, -1, 32).amax(-1) / steps / 2 * 1.02).all()


def test_groups_of_zeros_survive():
    weights = torch.zeros(16, 64)
    for quantization in ("auto", "none", "int8", "int4"):
        assert torch.equal(weights_in(pack(weights, None, quantization)), weights)


def weights_in(packed):
    """The weights that the kernels multiply by, read as their product with one-hot rows."""
    return PackedLinear(packed)(torch.eye(packed.shape[1])).T


def rounded(weights, quantization):
    return weights_in(pack(weights, None, quantization))


STORED = {
    "float32": torch.randn(100, 160),
    "bfloat16": torch.randn(100, 160).bfloat16().float(),
    "int8": rounded(torch.randn(100, 160), "int8"),
    "int4": rounded(torch.randn(100, 160), "int4"),
}


@pytest.mark.parametrize("format", STORED)
def test_linear_is_exact_and_bit_equal_for_any_position_of_a_row(format):
    weights, bias = STORED[format], torch.randn(100)
    compact, plain = PackedLinear(pack(weights, bias, "auto")), PackedLinear(pack(weights, bias, "none"))
    assert compact.packed.format == format
    x = torch.randn(40, 160)
    y = compact(x)
    torch.testing.assert_close(y.double(), x.double() @ weights.double().T + bias.double(), atol=1e-4, rtol=0)
    assert torch.equal(plain(x), y)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13):
        assert torch.equal(compact(x[7 : 7 + rows]), y[7 : 7 + rows])
    for number in (1, 2, 3, 5):
        with threads(number):
            assert torch.equal(compact(x), y)


def test_a_long_row_crosses_the_blocks_of_k():
    weights, x = torch.randn(70, 4000), torch.randn(9, 4000)
    y = PackedLinear(pack(weights, None, "none"))(x)
    torch.testing.assert_close(y.double(), x.double() @ weights.double().T, atol=2e-3, rtol=0)
    assert torch.equal(PackedLinear(pack(weights, None, "none"))(x[:3]), y[:3])


FUSED = {"llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 3, "smollm3": 3, "gemma3_text": 0, "phi3": 0}


@pytest.mark.parametrize("model_type", FUSED)
def test_which_layers_are_fused(tokenizer, model_type):
    loaded, _ = tiny_pair(tokenizer, model_type, vocab_size=300)
    assert num_fused_layers(loaded.model) == FUSED[model_type]
    assert not any(type(module) is nn.Linear for module in loaded.model.modules())


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"no_rope_layers": [1, 0, 1]}], ids=str)
def test_a_layer_that_differs_from_llamas_is_not_fused(tokenizer, change):
    model_type = "smollm3" if "no_rope_layers" in change else "llama"
    loaded, _ = tiny_pair(tokenizer, model_type, vocab_size=300, **change)
    assert num_fused_layers(loaded.model) == (2 if model_type == "smollm3" else 0)


def test_a_layer_that_differs_only_at_far_positions_is_not_fused(tokenizer):
    scaling = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    scaling["original_max_position_embeddings"] = 16
    loaded, _ = tiny_pair(tokenizer, "ministral3", vocab_size=300, rope_parameters=scaling, head_dim=8)
    assert num_fused_layers(loaded.model) == 0


def test_the_embedded_model_keeps_its_4_bit_weights(embedded):
    assert num_fused_layers(embedded.model) == 30
    formats = [matrix.format for module in embedded.model.modules() for matrix in getattr(module, "matrices", ())]
    assert formats == ["int4"] * 120 + ["int8"]


def test_logits_are_the_same_bits_alone_and_in_a_crowd(embedded, monkeypatch):
    """With plain and aligned rows, prefills beside decodes, other chunk sizes, page sizes and thread counts."""
    from linalign.alignment_core.request import Principle
    from linalign.alignment_core.text.prompts import PromptBuilder
    from tests.alignment_core.test_embedded import CASES, GREEDY

    builder = PromptBuilder(embedded.tokenizer)
    prompts = [
        builder.build([{"role": "user", "content": question}], [Principle(text, ratio=ratio)])
        for (question, text), ratio in zip(CASES[:6], [2.0, 0.0, 5.0, 0.5, 0.0, 2.0], strict=True)
    ]
    seen = []

    def watched(engine, prompt):
        forward = engine.runner.forward

        def spy(step):
            logits, at = forward(step), 0
            for sequence in step.drawing:
                if sequence.prompt is prompt:
                    seen[-1].append(logits[at : at + len(sequence.branches)].clone())
                at += len(sequence.branches)
            return logits

        monkeypatch.setattr(engine.runner, "forward", spy)
        seen.append([])
        return engine

    for number, config in (
        (1, {"num_pages": 64}),
        (3, {"num_pages": 600, "page_size": 5, "max_num_batched_tokens": 50}),
    ):
        engine = watched(make_engine(embedded, **config), prompts[0])
        with threads(number):
            run_all(engine, [(prompt, GREEDY) for prompt in (prompts if len(seen) > 1 else prompts[:1])])
    alone, crowd = seen
    assert len(alone) == len(crowd) == GREEDY.max_tokens
    assert all(torch.equal(a, b) for a, b in zip(alone, crowd, strict=True))


@pytest.mark.parametrize(("quantization", "head_dim"), [("int8", 64), ("int4", 128), ("int4", 16)])
def test_rounded_weights_run_as_the_oracle_with_those_weights(tokenizer, quantization, head_dim):
    from tests.engines import GREEDY, judge, prompts

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "head_dim": head_dim}
    loaded, oracle = tiny_pair(tokenizer, kernels=False, **sizes)
    for module in oracle.model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.detach().float(), quantization).double()
    replace_layers(loaded.model, quantization)
    assert num_fused_layers(loaded.model) == 3
    outputs = run_all(make_engine(loaded, num_pages=400), [(prompt, GREEDY) for prompt in prompts()])
    for prompt, output in zip(prompts(), outputs, strict=True):
        judge(oracle, prompt, output)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype):
    """bfloat16 is a storage format for weights; the arithmetic stays float32."""
    loaded = load(dtype=dtype, quantization="auto" if dtype == "bfloat16" else "none")
    formats = {matrix.format for module in loaded.model.modules() for matrix in getattr(module, "matrices", ())}
    assert formats == {dtype}
    assert loaded.model.dtype == torch.float32


IN_NARROW_VECTORS = """
import sys
import pytest
from linalign.alignment_core.cpu import kernels
others = tuple(flag for flag in kernels.FLAGS if flag != "-O3" and not flag.startswith("-march"))
kernels.FLAGS = (*others, "-march={processor}")
sys.exit(pytest.main(["-q", "-k", "linear or long_row or rounded", "tests/alignment_core/test_cpu.py"]))
"""


PROCESSORS = [pytest.param("x86-64", marks=pytest.mark.long), "x86-64-v3"]


@pytest.mark.parametrize("processor", PROCESSORS if platform.machine() == "x86_64" else [])
def test_kernels_for_older_processors_give_equal_results(processor):
    """Vectors of four and eight floats: code paths other than AVX-512."""
    code = IN_NARROW_VECTORS.format(processor=processor)
    ran = fork_server.run(code)
    assert ran.returncode == 0, ran.stdout  # pytest also fails if it collects no tests or the kernels are missing


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_torch_path_runs_with_a_warning(compiler):
    code = (
        "import logging; logging.basicConfig();"
        "from linalign import *;"
        "from linalign.alignment_core.cpu.kernels import library;"
        "messages = [{'role': 'user', 'content': 'How do I get to work?'}];"
        "params = SamplingParams(temperature=0, max_tokens=48);"
        "engine = Engine.load().start();"
        "print(''.join(o.text for o in engine.chat(messages, 'Encourage cycling.', 2.0, params)));"
        "engine.stop(); assert library() is None"
    )
    ran = fork_server.run(code, env={**os.environ, "CXX": compiler}, check=True)
    assert ran.stdout.strip() == reply(2)
    assert "slower" in ran.stderr
