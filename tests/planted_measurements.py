"""benchmarks/gpu.py with measurements that crash, hang and fail on purpose, for test_gpu_benchmark.py."""

import math
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import gpu
from gpu_measurements.process import Measurement


def works(_):
    return {"seen by": os.getpid(), "no number": math.nan, "no JSON": set}


def dies(_):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(_):
    time.sleep(1000)


def fails(bench):
    bench.partial["half of it"] = 1
    raise RuntimeError("shapes do not match")


def breaks_the_device(bench):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.synchronize = synchronize


def needs_no_compile(bench):
    """Like the start of the engine when Inductor fails: works only without compilation."""
    assert bench.without == "compile", "Inductor fails"
    return {}


def needs_no_triton(bench):
    """Fails while the engine chooses Triton; a retry without Triton succeeds."""
    from gpu_measurements.parts import without  # imported here, because importing torch takes seconds

    from linalign.alignment_core.execution import model_runner

    model_runner._choose_backend = mock.Mock(return_value="linalign_triton")
    with without(bench.without):
        assert model_runner._choose_backend(None) == "linalign_paged", "Triton is at fault"
    return {}


def planted(function, group, shared=False):
    return Measurement(f"tests.planted_measurements:{function.__name__}", 2, group, shared=shared)


MEASUREMENTS = {
    "about": gpu.MEASUREMENTS["about"],
    "first": planted(works, "a"),
    "second": planted(works, "a"),
    "dies": planted(dies, "a"),
    "after death": planted(works, "a"),
    "hangs": planted(hangs, "a"),
    "after hanging": planted(works, "a"),
    "fails": planted(fails, "a"),
    "after failing": planted(works, "a"),
    "breaks": planted(breaks_the_device, "a"),
    "after breaking": planted(works, "a"),
    "shared": planted(works, "b", shared=True),
    "dies too": planted(dies, "b"),
    "after that": planted(works, "b"),
    "broken": planted(fails, "c", shared=True),
    "needs it": planted(works, "c"),
    "so does": planted(works, "c"),
    "starts": planted(works, "d", shared=True),
    **{f"dies of it, {i}": planted(dies, "d") for i in range(4)},
    "starts without": planted(needs_no_compile, "e", shared=True),
    "after it": planted(works, "e"),
    "smoke: one": planted(needs_no_triton, "smoke"),
    "smoke: two": planted(needs_no_triton, "smoke"),
    "smoke: three": planted(fails, "smoke"),
    "smoke: four": planted(works, "smoke"),
}

if __name__ == "__main__":
    gpu.MEASUREMENTS = MEASUREMENTS
    gpu.main(sys.argv[1:])
