"""Cold starts: which modules are not imported, and what is refused before slow imports."""

import json
import re
import socket
import subprocess
import sys
import types

import gguf
import httpx
import pytest

from linalign.alignment_core.loading import preflight
from linalign.alignment_core.loading.checkpoint import Checkpoint, look_at
from linalign.server.commands.lean_imports import lean_imports
from tests.serving import serving

pytestmark = pytest.mark.slow

HEAVY = {"torch", "transformers", "numpy", "fastapi", "uvicorn", "jinja2", "matplotlib"}
# Packages that transformers imports if they are installed, and that the embedded model does not use.
UNUSED = {
    "gguf",
    "llguidance",
    "matplotlib",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torchao",
    "triton",
}
MODULES = """
import atexit, json, sys
atexit.register(lambda: open({file!r}, "w").write(json.dumps(sorted(sys.modules))))
"""


def command_line(tmp_path, *args):
    """Run a command line in a fresh interpreter; returns the completed process and the names of imported modules."""
    code = MODULES.format(file=str(tmp_path / "modules")) + "from linalign.server.commands.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=tmp_path)
    return done, set(json.loads((tmp_path / "modules").read_text()))


def test_the_embedded_model_is_served_without_what_it_does_not_use(embedded, tmp_path):  # noqa: ARG001 - converted
    with serving(patch=MODULES.format(file=str(tmp_path / "modules")), cold=True) as (url, _):
        body = {"model": "smollm2", "principle": "Be brief.", "max_tokens": 8} | MESSAGES
        assert httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
    imported = set(json.loads((tmp_path / "modules").read_text()))
    assert {"torch", "transformers", "fastapi"} <= imported
    assert not imported & UNUSED


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
MESSAGES = {"messages": [{"role": "user", "content": "How do I get to work?"}]}
SEVERAL = {"principle": [{"text": "Encourage cycling."}, {"text": "Be brief.", "ratio": 0.5}], "alignment_trace": True}
REQUESTS = [
    ("/v1/chat/completions", MESSAGES | SEVERAL | {"logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", MESSAGES | {"response_format": {"type": "json_object"}, "alignment_method": "adaptive"}),
    ("/v1/chat/completions", MESSAGES | {"tools": [TOOL], "tool_choice": "required", "principle": "Be brief."}),
    ("/v1/chat/completions", MESSAGES | {"n": 2, "repetition_penalty": 1.2, "logit_bias": {"500": 5}}),
    ("/v1/completions", {"prompt": "The sea", "echo": True, "logprobs": 1}),
]


@pytest.mark.parametrize("args", [[], pytest.param(["--quantization", "int8"], marks=pytest.mark.long)], ids=str)
def test_replies_do_not_depend_on_lean_imports(embedded, args):  # noqa: ARG001 - converted
    replies = []
    for cold in (True, False):
        with serving(*args, cold=cold) as (url, _):
            for path, fields in REQUESTS:
                body = {"model": "smollm2", "max_tokens": 12, "temperature": 0.8, "seed": 5, **fields}
                answer = httpx.post(url + path, json=body, timeout=60).raise_for_status().json()
                text = json.dumps(answer["choices"])
                replies.append(re.sub(r'"id": "[^"]+"', "", text))  # ids of tool calls are random
    assert replies[: len(REQUESTS)] == replies[len(REQUESTS) :]


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *[([command, "--help"], 0) for command in ("serve", "chat", "bench", "eval")],
        *[([command, "--no-such-flag"], 2) for command in ("serve", "chat", "bench", "eval")],
        (["eval", "hh", "--output", "out"], 1),
        (["eval", "follow", "--output", "out", "--ratios", "1,99"], 1),
        (["bench", "--requests", "0"], 1),
        (["chat", "--alignment-ratio", "21"], 1),
    ],
    ids=str,
)
def test_help_and_wrong_flags_import_nothing_heavy(tmp_path, args, status):
    done, imported = command_line(tmp_path, *args)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert not imported & HEAVY
    if status:
        assert f"linalign {args[0]}: " in done.stderr


def test_lean_imports_do_nothing_after_transformers_is_imported(monkeypatch):
    """Because transformers remembers which packages are installed."""
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils", raising=False)
    before = dict(sys.modules)
    with lean_imports():
        assert sys.modules == before


def write_config(folder, **changed):
    folder.mkdir()
    config = {"model_type": "llama", "max_position_embeddings": 512, "num_key_value_heads": 2, **changed}
    (folder / "config.json").write_text(json.dumps(config))


def write_gguf(file, heads):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_array("general.languages", ["en", "de"])
    writer.add_context_length(256)
    writer.add_head_count_kv(heads)
    writer.add_array("tokenizer.ggml.tokens", [f"word{number}" for number in range(20_000)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.fixture
def files(tmp_path):
    """Models without weights, for the checks before loading."""
    write_config(tmp_path / "plain")
    write_config(tmp_path / "nested", text_config={"max_position_embeddings": 256, "num_attention_heads": 6})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    write_gguf(tmp_path / "model.gguf", 4)
    write_gguf(tmp_path / "layers.gguf", [4, 8])
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(20) + b"\x02" + bytes(7) + b"\xff\xff" + bytes(99))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "presets.yaml").write_text("teacher: {principal: x}")
    return tmp_path


def test_models_are_recognised_from_their_files(files, monkeypatch):
    monkeypatch.chdir(files)
    assert look_at("plain") == Checkpoint(512, 2)
    assert look_at("nested") == Checkpoint(256, 6)
    assert look_at("model.gguf") == Checkpoint(256, 4)
    assert look_at("layers.gguf") == Checkpoint(256)
    assert look_at("damaged.gguf") == Checkpoint()
    assert look_at(None) == look_at("smollm2") == Checkpoint(8192, 3)
    assert look_at("adapter") == look_at("some/model-of-a-hub") == Checkpoint()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["./nowhere"], "there is no directory ./nowhere"),
        (["nowhere.gguf"], "there is no file nowhere.gguf"),
        (["text.gguf"], "text.gguf is not a GGUF file"),
        (["empty"], "empty can't be loaded: it has no file config.json"),
        (["--presets", "nowhere.yaml"], "the presets of nowhere.yaml can't be used"),
        (["--presets", "presets.yaml"], "the presets of presets.yaml can't be used"),
        (["--config", "nowhere.yaml"], "there is no config file nowhere.yaml"),
        (["--api-keys-file", "nowhere"], "nowhere"),
        (["--max-model-len", "8193"], "max_model_len is 8193, but the model's context is 8192"),
        (["plain", "--max-model-len", "513"], "max_model_len is 513, but the model's context is 512"),
        (["nested", "--max-model-len", "257"], "max_model_len is 257, but the model's context is 256"),
        (["model.gguf", "--max-model-len", "257"], "max_model_len is 257, but the model's context is 256"),
        (["model.gguf", "--tensor-parallel-size", "2"], "a GGUF file can't be split"),
        (["--tensor-parallel-size", "2"], "smollm2 has 3 key heads, which 2 processes can't share evenly"),
        (["plain", "--tensor-parallel-size", "3"], "plain has 2 key heads, which 3 processes can't share evenly"),
        (
            ["plain", "--tensor-parallel-size", "2", "--quantization", "int8"],
            "a tensor-parallel model can't be quantised",
        ),
        (["--quantization", "fp8", "--device", "cpu"], "quantization fp8 is for GPUs"),
        (["--kv-cache-dtype", "fp8", "--device", "cpu"], "the KV cache of a CPU is float32, not fp8"),
        (["--kv-cache-dtype", "bfloat16", "--device", "cpu"], "the KV cache of a CPU is float32, not bfloat16"),
        (["--host", "no such host"], "can't listen on no such host, port "),
        (["--host", "192.0.2.1"], "can't listen on 192.0.2.1, port "),
    ],
    ids=str,
)
def test_unservable_models_are_refused_before_torch_is_imported(files, args, words):
    done, imported = command_line(files, "serve", *args)
    assert done.returncode == (3 if "listen" in words else 1)
    assert done.stderr.startswith("linalign serve: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1 or "presets" in words  # errors in presets have lines for each field
    assert not imported & {"torch", "transformers"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_in_use_is_refused_before_torch_is_imported(tmp_path, host):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done, imported = command_line(tmp_path, "serve", "--host", host, "--port", str(port))
    assert done.returncode == 3
    assert done.stderr.startswith(f"linalign serve: can't listen on {host}, port {port}: ")
    assert "torch" not in imported


@pytest.mark.skipif(preflight.may_have_cuda(), reason="there may be a GPU")
def test_a_gpu_that_torch_does_not_support_is_refused_before_the_import(tmp_path):
    for device in ("cuda", "cuda:1"):
        done, imported = command_line(tmp_path, "serve", "--device", device)
        assert done.returncode == 1
        assert f"there is no CUDA device for --device {device}" in done.stderr
        assert "torch" not in imported
