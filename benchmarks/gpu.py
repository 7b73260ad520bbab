"""Correctness and speed of the engine on one GPU. benchmarks/README.md has the command.

Every measurement has its own time limit. Measurements share a process as long as the device works. The output, one
JSON file, is complete after each measurement. It has the traceback of each failure, and names the measurements that
exceed the budget; `--resume` continues with these. A feature that fails is tried again without CUDA graphs, without
torch.compile, and without Triton, to show which of them is at fault.

Weights are random, so no checkpoint is needed. --tiny runs everything on toy shapes on any machine, to test the
script; its numbers are meaningless.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_measurements.process import Measurement  # noqa: E402
from gpu_measurements.run import Run  # noqa: E402

EXPECTED = json.loads((ROOT / "benchmarks/gpu_measurements/expected.json").read_text())
FEATURES = [name for name in EXPECTED["features"] if name != "compiled"]


def measurement(function: str, limit: float, group: str, *arguments: str, shared: bool = False) -> Measurement:
    return Measurement(f"gpu_measurements.{function}", limit, group, arguments, shared)


MEASUREMENTS = {  # the most important ones first
    "about": measurement("bench:about", 60, "about"),
    **{f"smoke: {name}": measurement("smoke:smoke", 30, "smoke", name) for name in FEATURES},
    "smoke: compiled": measurement("smoke:smoke", 90, "smoke, compiled", "compiled"),
    "float32": measurement("precision:float32", 60, "exact"),
    "engine start": measurement("speed:engine_start", 200, "large", shared=True),
    "one": measurement("speed:one", 60, "large"),
    "64": measurement("speed:some", 60, "large"),
    "256": measurement("speed:many", 90, "large"),
    "profile of one": measurement("speed:profile_one", 30, "large"),
    "profile of 64": measurement("speed:profile_some", 30, "large"),
    "HTTP": measurement("over_http:over_http", 90, "large"),  # in this group, because it uses the same engine
    "generate with guidance": measurement("peers:guided_generate", 60, "peers"),
    "bfloat16": measurement("precision:bfloat16", 60, "rest"),
    "invariance": measurement("precision:invariance", 60, "rest"),
    "attention": measurement("rest:attention", 30, "rest"),
    "prompt lookup": measurement("rest:prompt_lookup", 120, "rest"),
    "continuous batching": measurement("peers:continuous_batching", 180, "slow peers"),  # the slowest one
}

GOALS: dict[str, tuple[str, float, Callable[[dict[str, Any]], float]]] = {  # functions of all measured values
    "1 aligned, tokens/s of the roofline's": (
        ">=", 0.85,
        lambda m: m["bytes of weights that a step reads"] / m["copy bandwidth, bytes/s"] / m["1 aligned, s a step"],
    ),
    "1 aligned, time per token of 1 plain's": ("<=", 1.05, lambda m: m["1 aligned, s a step"] / m["1 plain, s a step"]),
    "64 aligned, total time of 64 plain's": ("<=", 1.35, lambda m: m["64 aligned, s"] / m["64 plain, s"]),
    "256 aligned, row tokens/s of 512 plain's": (">=", 0.95, lambda m: m["512 plain, s"] / m["256 aligned, s"]),
    "1 aligned, tokens/s of generate with guidance": (
        ">=", 8.0, lambda m: m["generate with guidance, s a token"] / m["1 aligned, s a step"],
    ),
    "64 aligned, row tokens/s of transformers' continuous batching": (
        ">=", 1.3, lambda m: m["row tokens of 64 aligned"] / m["64 aligned, s"] / m["continuous batching, tokens/s"],
    ),
    "mixing, set and draw for 256, share of the step": (
        "<=", 0.05, lambda m: m["draw of 256, s"] / m["256 aligned, s a step"],
    ),
    "256 streams over HTTP, tokens/s of the engine's alone": (
        ">=", 0.9, lambda m: m["256 over HTTP, tokens/s"] / m["256 without HTTP, tokens/s"],
    ),
    "prompt lookup, tokens/s of without": (">=", 2.0, lambda m: m["without drafts, s"] / m["with drafts, s"]),
    "float32 greedy replies that differ from the CPU oracle's": ("<=", 0, lambda m: m["float32 replies that differ"]),
    "bfloat16, mean KL to float32, nats": ("<=", 1e-2, lambda m: m["bfloat16 KL, nats"]),
    "batch-invariant, greedy tokens that differ alone and in a crowd": (
        "<=", 0, lambda m: m["tokens that differ in company"],
    ),
}  # fmt: skip


def ratios(measured: dict[str, Any]) -> dict[str, Any]:
    """Every goal with the measured value, which is None if something is missing, and whether it is met."""
    result = {}
    for name, (kind, goal, function) in GOALS.items():
        try:
            value = function(measured)
        except (KeyError, TypeError, ZeroDivisionError):
            value = None
        met = None if value is None else value >= goal if kind == ">=" else value <= goal
        result[name] = {"value": value, "goal": f"{kind} {goal}", "met": met}
    return result


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in total, imports included")
    parser.add_argument("--resume", type=Path, help="an earlier output; its results are not measured again")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, metavar="NAME", help="these measurements")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on any machine")
    options = parser.parse_args(args)
    if options.output.exists() and not options.output.is_file():
        parser.error(f"--output: {options.output} is no regular file, and would be replaced by one")
    outcomes = json.loads(options.resume.read_text())["measurements"] if options.resume else {}
    run = Run(MEASUREMENTS, ratios, options.output, options.tiny, STARTED + options.budget, outcomes)
    run.go([name for name in MEASUREMENTS if options.only is None or name in options.only])
    for name, row in ratios(run.measured).items():
        value = "not measured" if row["value"] is None else f"{row['value']:.3g}"
        print(f"{name:65} {value:>12}  {row['goal']:8} {({True: 'met', False: 'MISSED', None: ''})[row['met']]}")


if __name__ == "__main__":
    main()
