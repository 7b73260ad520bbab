"""benchmarks/gpu.py on toy shapes, with measurements that crash, hang and fail on purpose."""

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests import fork_server

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_measurements import expected, precision  # noqa: E402
from gpu_measurements.features import FEATURES  # noqa: E402
from gpu_measurements.rounding import to_fp8, to_int4, to_int8  # noqa: E402

pytestmark = pytest.mark.slow

GPU_ONLY = {"smoke: fp8", "continuous batching"}  # unsupported on a CPU


# Its processes are forks here, so that they need no imports. The process that they are forked from has run nothing yet.
FORKED = """
import multiprocessing, os, runpy, sys
if "LONG_RUN" not in os.environ:
    multiprocessing.get_context = lambda _, context=multiprocessing.get_context("fork"): context
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def command(script, *args):
    """Code and arguments for a fork that runs the script."""
    return FORKED, script, "--tiny", *map(str, args)


def run_gpu(*args, script="benchmarks.gpu"):
    return fork_server.run(*command(script, *args), cwd=ROOT, check=True).stdout


@contextlib.contextmanager
def started(script, *args):
    """Start the script; yield its process and the lines that it prints."""
    read_end, write_end = os.pipe()
    code, *argv = command(script, *args)
    process = fork_server.Process(code, ["-c", *argv], cwd=ROOT, stdout=write_end)
    os.close(write_end)
    with process, open(read_end) as lines:
        yield process, lines


def started_names(output):
    return set(re.findall(r"^(.*): begins", output, re.MULTILINE))


def result(path):
    report = json.loads(path.read_text())
    return report, {name: outcome["status"] for name, outcome in report["measurements"].items()}


def test_a_killed_measurement_does_not_end_the_run(tmp_path):
    output, victim = tmp_path / "gpu.json", "attention"
    lines = []
    with started("benchmarks.gpu", "--budget", 1000, "--output", output) as (process, printed):
        for line in printed:
            lines.append(line)
            if begins := re.match(rf"{victim}: begins, process (\d+)", line):
                os.kill(int(begins[1]), signal.SIGKILL)
    assert process.returncode == 0
    report, statuses = result(output)
    expected_statuses = dict.fromkeys(gpu.MEASUREMENTS, "ok") | dict.fromkeys(GPU_ONLY, "not to be had here")
    assert statuses == expected_statuses | {victim: "killed"}, "".join(lines)
    assert "SIGKILL" in report["measurements"][victim]["why"]
    rows = report["ratios"]
    assert {name for name, row in rows.items() if row["value"] is None} == {
        "64 aligned, row tokens/s of transformers' continuous batching"
    }
    assert rows["float32 greedy replies that differ from the CPU oracle's"]["met"]
    assert rows["batch-invariant, greedy tokens that differ alone and in a crowd"]["met"]
    assert rows["bfloat16, mean KL to float32, nats"]["met"]
    profile = report["measurements"]["profile of one"]["measured"]["profile of 1 aligned"]
    assert len(profile["kernels"]) == 20
    assert profile["s a step in kernels"] > 0

    again = tmp_path / "again.json"
    printed = run_gpu("--resume", output, "--output", again)
    assert started_names(printed) == {"about", victim, *GPU_ONLY}
    report, statuses = result(again)
    assert statuses == expected_statuses

    report["measurements"]["about"]["measured"]["device"] = "another one"
    output.write_text(json.dumps(report))
    printed = run_gpu("--resume", output, "--only", victim, "--output", again)
    assert started_names(printed) == {"about", victim}
    assert result(again)[1] == {"about": "ok", victim: "ok"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Outcomes and output of a run whose measurements crash, hang and fail."""
    output = tmp_path_factory.mktemp("planted") / "gpu.json"
    printed = run_gpu("--output", output, script="tests.planted_measurements")
    return result(output)[0]["measurements"], printed


def test_a_dead_hanging_or_failing_task_affects_no_other(planted):
    outcomes, _ = planted
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "about": "ok",
        "first": "ok",
        "second": "ok",
        "dies": "killed",
        "after death": "ok",
        "hangs": "timed out",
        "after hanging": "ok",
        "fails": "failed",
        "after failing": "ok",
        "breaks": "failed",
        "after breaking": "ok",
        "shared": "ok",
        "dies too": "killed",
        "after that": "ok",
        "broken": "failed",
        "needs it": "skipped",
        "so does": "skipped",
        "starts": "ok",
        "dies of it, 0": "killed",
        "dies of it, 1": "killed",
        "dies of it, 2": "skipped",
        "dies of it, 3": "skipped",
        "starts without": "ok",
        "after it": "ok",
        "smoke: one": "failed",
        "smoke: two": "failed",
        "smoke: three": "failed",
        "smoke: four": "ok",
    }
    assert "SIGSEGV" in outcomes["dies"]["why"]
    assert "in fails" in outcomes["fails"]["traceback"]
    assert "illegal memory access" in outcomes["breaks"]["why"]
    assert outcomes["fails"]["measured before"] == {"half of it": 1}
    assert outcomes["needs it"]["why"] == "it needs 'broken': failed"
    assert outcomes["dies of it, 2"]["why"] == "two processes in a row have measured nothing after 'starts'"
    assert outcomes["starts without"]["without"] == "compile"
    assert "Inductor fails" in outcomes["starts without"]["with it"]["traceback"]


def test_a_process_is_reused_while_its_device_works(planted):
    outcomes, printed = planted
    pids = {
        name: outcome["measured"]["seen by"]
        for name, outcome in outcomes.items()
        if "seen by" in outcome.get("measured", {})
    }
    assert pids["first"] == pids["second"]
    assert pids["after hanging"] == pids["after failing"]
    assert len({pids[name] for name in ("first", "after death", "after hanging", "after breaking")}) == 4
    assert pids["shared"] == pids["after that"]  # the new process runs the shared measurement again
    assert len(re.findall("^shared: begins", printed, re.MULTILINE)) == 2
    assert "needs it: begins" not in printed


def test_a_failed_feature_is_tried_without_each_part_of_the_engine(planted):
    outcomes, printed = planted
    for name in ("smoke: one", "smoke: two"):
        tries = outcomes[name]["without"]
        assert tries["Triton"] == "ok"
        assert "Triton is at fault" in tries["graphs"]
        assert "Triton is at fault" in tries["compile"]
    assert all("shapes do not match" in message for message in outcomes["smoke: three"]["without"].values())
    tried = re.findall(r"^(smoke: \w+) without Triton", printed, re.MULTILINE)
    assert tried == ["smoke: one", "smoke: three", "smoke: two"], "each kind of failure comes first"


def test_the_output_is_valid_json_for_any_value(planted):
    measured = planted[0]["first"]["measured"]
    assert measured["no number"] is None
    assert measured["no JSON"] == "<class 'set'>"


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """Otherwise they would keep the device's memory that the next run needs."""
    run = ("tests.planted_measurements", "--only", "hangs", "--output", tmp_path / "gpu.json")
    with started(*run) as (process, printed):
        child = next(int(match[1]) for line in printed if (match := re.match(r"hangs: begins, process (\d+)", line)))
        process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(child).wait(timeout=30)
    assert not psutil.pid_exists(child)


def test_a_failure_is_kept_if_there_is_no_time_for_a_retry(planted, tmp_path):
    earlier, output = tmp_path / "earlier.json", tmp_path / "gpu.json"
    earlier.write_text(json.dumps({"measurements": planted[0]}))
    run_gpu("--budget", 0, "--resume", earlier, "--output", output, script="tests.planted_measurements")
    outcomes = result(output)[0]["measurements"]
    assert outcomes["fails"] == planted[0]["fails"] | {"again": {"status": "skipped", "why": "the budget is used up"}}
    assert outcomes["first"] == planted[0]["first"]


def test_a_device_is_not_replaced_by_the_output(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = fork_server.run(*command("benchmarks.gpu", "--output", tmp_path / "pipe"), cwd=ROOT)
    assert done.returncode == 2
    assert "is no regular file" in done.stderr
    assert (tmp_path / "pipe").is_fifo()


def test_tasks_beyond_the_budget_are_reported(tmp_path):
    output = tmp_path / "gpu.json"
    run_gpu("--budget", 0, "--output", output)
    assert result(output)[1] == dict.fromkeys(gpu.MEASUREMENTS, "skipped")


def test_every_feature_is_measured():
    assert {f"smoke: {name}" for name in FEATURES} <= set(gpu.MEASUREMENTS)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_the_oracle_rounds_like_torchao(quantization):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    rounding = {"int8": to_int8, "int4": to_int4, "fp8": to_fp8}[quantization]
    assert torch.equal(rounding(weight.double()), torchaos(quantization, weight))


def torchaos(quantization, weight):
    """torchao's integers and scales, multiplied in float64."""
    from torchao.quantization import Float8Tensor, Int8WeightOnlyConfig, PerRow, quant_primitives, quantize_

    if quantization == "int8":
        layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
        layer.weight.data = weight
        quantize_(layer, Int8WeightOnlyConfig())
        return layer.weight.qdata.double() * layer.weight.scale
    if quantization == "fp8":
        rounded = Float8Tensor.from_hp(weight, granularity=PerRow())
        return rounded.qdata.double() * rounded.scale
    # torchao creates int4 tensors on GPUs only; these are the functions that it calls
    block, limits = (1, 128), (0, 15)
    scale, middle = quant_primitives._choose_qparams_affine_tinygemm(
        weight, quant_primitives.MappingType.ASYMMETRIC, block, torch.int32, *limits
    )
    numbers = quant_primitives._quantize_affine_tinygemm(weight, block, scale, middle, torch.int32, *limits)
    groups = numbers.unflatten(-1, (-1, 128)).double()
    return ((groups - 8) * scale.unsqueeze(-1) + middle.unsqueeze(-1)).flatten(-2)


@pytest.mark.parametrize("name", FEATURES)
def test_expected_replies_are_the_oracles(name):
    stored = json.loads(expected.EXPECTED.read_text())["features"][name]
    computed = expected.of_feature(FEATURES[name])
    assert computed.keys() == stored.keys()
    assert computed["tokens"] == stored["tokens"]
    for key in computed.keys() - {"tokens"}:
        for a, b in zip(computed[key], stored[key], strict=True):
            assert a == pytest.approx(b, abs=1e-9)


def test_expected_replies_in_float32_are_the_oracles():
    stored = json.loads(expected.EXPECTED.read_text())["float32"]
    assert len(stored["replies"]) == precision.NUM_PROMPTS
    loaded = expected.exact_model(expected.SMALL, expected.torch.float32, expected.CPU, precision.SCALE, precision.SEED)
    assert precision.checksum(loaded) == stored["weights"]
    reply = stored["replies"][3]
    gap = expected.least_gap(expected.oracle_of(loaded), precision.judged_prompt(reply["prompt"]), reply["tokens"])
    assert gap > expected.CLEAR
