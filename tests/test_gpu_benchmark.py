"""benchmarks/gpu.py on toy shapes, with what dies, hangs and fails on purpose."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from gpu_measurements import expected, precision  # noqa: E402
from gpu_measurements.features import FEATURES  # noqa: E402

ELSEWHERE = {"smoke: fp8", "continuous batching"}  # not to be had on a CPU


def command(*args):
    return [sys.executable, "benchmarks/gpu.py", *map(str, args)]


def result(path):
    found = json.loads(path.read_text())
    return found, {name: outcome["status"] for name, outcome in found["measurements"].items()}


def test_all_of_it_though_one_measurement_is_killed(tmp_path):
    output, victim = tmp_path / "gpu.json", "attention"
    process = subprocess.Popen(
        command("--tiny", "--budget", 1000, "--output", output), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if begins := re.match(rf"{victim}: begins, process (\d+)", line):
            os.kill(int(begins[1]), signal.SIGKILL)
    assert process.wait() == 0
    found, statuses = result(output)
    expected_statuses = dict.fromkeys(statuses, "ok") | dict.fromkeys(ELSEWHERE, "not to be had here")
    assert statuses == expected_statuses | {victim: "killed"}, "".join(lines)
    assert "SIGKILL" in found["measurements"][victim]["why"]
    rows = found["ratios"]
    assert {name for name, row in rows.items() if row["value"] is None} == {
        "64 aligned, row tokens/s of transformers' continuous batching"
    }
    assert rows["float32 greedy replies that differ from the CPU oracle's"]["met"]
    assert rows["batch-invariant, greedy tokens that differ alone and in a crowd"]["met"]
    assert rows["bfloat16, mean KL to float32, nats"]["met"]
    profile = found["measurements"]["profile of one"]["measured"]["profile of 1 aligned"]
    assert len(profile["kernels"]) == 20
    assert profile["s a step in kernels"] > 0

    again = tmp_path / "again.json"
    done = subprocess.run(
        command("--tiny", "--resume", output, "--output", again), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"^(.*): begins", done.stdout, re.MULTILINE)) == {victim, *ELSEWHERE}
    assert result(again)[1] == expected_statuses


PLANTED = """
import os, signal, sys, time
sys.path.insert(0, "benchmarks")
import gpu
from gpu_measurements import smoke
from alignment_core import model_runner

def dies(bench): os.kill(os.getpid(), signal.SIGSEGV)
def hangs(bench): time.sleep(1000)
def fails(bench): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def works(bench): return {"seen by": os.getpid()}
def needs_no_triton(bench):
    assert model_runner._choose_backend(None) == "linalign_paged", "Triton is at fault"
    return {}

choose = model_runner._choose_backend
model_runner._choose_backend = lambda _: "linalign_triton"
gpu.FIRST_LIMIT = 2
gpu.MEASUREMENTS = {
    name: gpu.Measurement(function, 2, group) for name, function, group in [
        ("first", works, "a"), ("second", works, "a"), ("dies", dies, "a"), ("after death", works, "a"),
        ("hangs", hangs, "a"), ("after hanging", works, "a"), ("fails", fails, "a"), ("after failing", works, "a"),
        ("smoke: one", needs_no_triton, "smoke"), ("smoke: two", needs_no_triton, "smoke"),
        ("smoke: three", works, "smoke"),
    ]
}
gpu.main(sys.argv[1:])
"""


def test_what_dies_hangs_or_fails_harms_nothing_else(tmp_path):
    output = tmp_path / "gpu.json"
    run = [sys.executable, "-c", PLANTED, "--tiny", "--output", str(output)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, statuses = result(output)
    assert statuses == {
        "first": "ok",
        "second": "ok",
        "dies": "killed",
        "after death": "ok",
        "hangs": "timed out",
        "after hanging": "ok",
        "fails": "failed",
        "after failing": "ok",
        "smoke: one": "failed",
        "smoke: two": "failed",
        "smoke: three": "ok",
    }
    outcomes = found["measurements"]
    assert "SIGSEGV" in outcomes["dies"]["why"]
    assert "in fails" in outcomes["fails"]["traceback"]
    by = {name: outcome["measured"]["seen by"] for name, outcome in outcomes.items() if outcome["status"] == "ok"}
    assert by["first"] == by["second"] != by["after death"]
    assert len({by[name] for name in ("first", "after death", "after hanging", "after failing")}) == 4
    tries = outcomes["smoke: one"]["without"]
    assert tries["Triton"] == "ok"
    assert "Triton is at fault" in tries["graphs"]
    assert "Triton is at fault" in tries["compile"]
    assert outcomes["smoke: two"]["without"] == "not tried: it fails as smoke: one does"


def test_what_does_not_fit_the_budget_is_named(tmp_path):
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        command("--tiny", "--budget", 0, "--output", output), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(result(output)[1].values()) == {"skipped"}


@pytest.mark.parametrize("name", FEATURES)
def test_expected_is_what_the_oracle_says(name):
    kept = json.loads(expected.EXPECTED.read_text())["features"][name]
    found = expected.of_feature(FEATURES[name])
    assert found["tokens"] == kept["tokens"]
    for mine, theirs in zip(found.get("logprobs", []), kept.get("logprobs", []), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-9)


def test_expected_replies_in_float32_are_the_oracles():
    kept = json.loads(expected.EXPECTED.read_text())["float32"]
    assert len(kept["replies"]) == precision.NUM_PROMPTS
    loaded = expected.exact_model(expected.SMALL, expected.torch.float32, expected.CPU, precision.SCALE, precision.SEED)
    assert precision.checksum(loaded) == kept["weights"]
    reply = kept["replies"][3]
    gap = expected.least_gap(expected.oracle_of(loaded), precision.judged_prompt(reply["prompt"]), reply["tokens"])
    assert gap > expected.CLEAR
