"""docs/scaling.md shows what its commands print, and the model in benchmarks/capacity counts as the engine does."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks import capacity_check
from benchmarks.capacity import crowd, hardware, host, load
from linalign import EngineConfig
from linalign.alignment_core.execution.model_runner import ModelRunner, RunnerConfig
from tests.engines import tiny_pair

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = re.findall(
    r"```sh\npython (-m benchmarks.+)\n```\n\n((?:\|.*\n)+)",
    (ROOT / "docs" / "scaling.md").read_text(),
)
SIZES = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_command_has_its_help():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert len(EXAMPLES) == text.count("```sh\n") > 0


@pytest.mark.parametrize(("command", "printed"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_the_document_has_the_commands_output(command, printed):
    done = run(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_the_engines_counts_do_not_change(embedded):
    """The engine's counts equal the recorded and the predicted ones: pages after replies, prefill of second turns."""
    recorded = capacity_check.read("capacity.json")["counts"]
    small, _ = tiny_pair(embedded.tokenizer, max_position_embeddings=2048)  # counts do not depend on the model
    assert capacity_check.count(dataclasses.replace(embedded, model=small.model)) == recorded
    for case, unit, predicted, measured in capacity_check.counted():
        assert predicted == measured, (case, unit)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_sizes_are_the_models(model_type, changes):
    config = CONFIG_MAPPING[model_type](**SIZES | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    counted = hardware.Model.of(json.loads(config.to_json_string(use_diff=False)) | {"dtype": "float32"})
    matrices = sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() > 1)
    assert counted.weight_bytes() == matrices  # the estimate ignores norms
    runner = ModelRunner(model, RunnerConfig(page_size=EngineConfig().page_size, max_model_len=64))
    assert counted.kv_bytes() * load.PAGE_SIZE == runner.page_bytes()


def test_the_engines_defaults():
    assert EngineConfig().page_size == load.PAGE_SIZE
    assert EngineConfig().gpu_memory_utilization == host.UTILIZATION


def test_a_directory_and_custom_numbers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    done = run("-m", "benchmarks.capacity", str(tmp_path), "--bandwidth", "1", "--memory", "4", "--principles", "1")
    assert done.returncode == 0, done.stderr
    assert "| concurrent sequences, limit | 64, --max-num-seqs |" in done.stdout


@pytest.mark.parametrize(("spread", "turns"), [(1, 0), (2, 1), (3, 2), (7, 6)])
def test_with_random_routing_a_replica_lacks_the_latest_turns(spread, turns):
    """With long histories, on average as many turns are missing as there are other replicas."""
    long = load.Load(history=10**6, message=100, reply=100)
    assert crowd.missing(long, spread) * long.history == pytest.approx(turns * (200 + 2 * load.TEMPLATE))
    short = load.Load(history=210, message=100, reply=100)  # one turn; another replica has it with this probability
    assert crowd.missing(short, spread) == pytest.approx(1 - 1 / spread)


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, ["--reply", "0"], "0 is less than 1"),
        ({}, ["nowhere.json"], "nowhere.json"),
        ({"num_local_experts": 8}, [], "experts"),
        ({}, ["--tensor-parallel-size", "4"], "2 key heads"),
        ({}, ["--tensor-parallel-size", "2", "--quantization", "fp8"], "fp8"),
    ],
)
def test_unsupported_models_and_arguments_are_refused(tmp_path, changes, arguments, words):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | changes))
    done = run("-m", "benchmarks.capacity", str(tmp_path), *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_model_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    for arguments in (["--memory", "3"], ["--sequences", "100000000"]):
        done = run("-m", "benchmarks.capacity", str(tmp_path), *arguments)
        assert "none, does not fit" in done.stdout
