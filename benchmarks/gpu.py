"""The engine on one GPU: right first, then as fast as the goals say. benchmarks/README.md has the command.

Every measurement runs in a process of its own, or in one that it shares with others until one of them fails; with a
time limit of its own. Processes are forked from this one, or started afresh where CUDA refuses that (as on the H200).
The output, one JSON, is whole after each measurement. What fails has its traceback there; what no longer fits the
budget is named, and `--resume` goes on with it. A feature that fails is tried again without CUDA graphs, without
torch.compile, without Triton, so that the report tells which of them is at fault.

Weights are random: no checkpoint is needed. --tiny runs all of it on toy shapes, on any machine: for testing the
script, its numbers mean nothing.
"""

import argparse
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
STARTED = time.monotonic()  # what follows takes seconds
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a GPU is asked in a way that forks survive

import torch  # noqa: E402
import transformers  # noqa: E402
from gpu_measurements import over_http, peers, precision, rest, smoke, speed  # noqa: E402
from gpu_measurements.bench import Bench, NotHere  # noqa: E402

Function = Callable[[Bench], dict[str, Any]]
SMOKE_BUDGET = 90.0  # seconds of all features together, retries included
FIRST_LIMIT = 45.0  # of the first feature of a process, which compiles
START_LIMIT = 120.0  # of the large engine's start


@dataclass(frozen=True)
class Measurement:
    """limit: seconds. group: those of one group share a process, and what they have made in it."""

    function: Function
    limit: float
    group: str


def about(bench: Bench) -> dict[str, Any]:
    """The device; its first use costs seconds, which are told here."""
    seconds = bench.timed(lambda: torch.ones(1, device=bench.device) + 1)
    if not bench.on_cuda:
        return {"device": platform.processor() or platform.machine(), "first use, s": seconds}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory, bytes": properties.total_memory,
        "compute capability": f"{properties.major}.{properties.minor}",
        "first use, s": seconds,
    }


MEASUREMENTS = {  # in the order of their worth
    "about": Measurement(about, 60, "about"),
    **{
        f"smoke: {name}": Measurement(function, 60 if name == "compiled" else 15, "smoke")
        for name, function in smoke.SMOKE.items()
    },
    "float32": Measurement(precision.float32, 60, "precision"),
    "engine start": Measurement(speed.engine_start, 150, "large"),
    "one": Measurement(speed.one, 60, "large"),
    "profile of one": Measurement(speed.profile_one, 30, "large"),
    "64": Measurement(speed.some, 60, "large"),
    "profile of 64": Measurement(speed.profile_some, 30, "large"),
    "256": Measurement(speed.many, 90, "large"),
    "generate with guidance": Measurement(peers.guided_generate, 45, "peers"),
    "continuous batching": Measurement(peers.continuous_batching, 60, "peers"),
    "HTTP": Measurement(over_http.over_http, 150, "HTTP"),
    "bfloat16": Measurement(precision.bfloat16, 60, "precision 2"),
    "invariance": Measurement(precision.invariance, 60, "precision 2"),
    "attention": Measurement(rest.attention, 30, "rest"),
    "prompt lookup": Measurement(rest.prompt_lookup, 90, "rest"),
}

GOALS: dict[str, tuple[str, float, Callable[[dict[str, Any]], float]]] = {  # of what was measured
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


# A process


def work(names: list[str], tiny: bool, measured: dict[str, Any], without: str | None, pipe: Connection) -> None:
    """Measure one after the other until one fails: it may have left the device unusable, or its memory full."""
    os.setpgrp()
    if without is not None:
        smoke.leave_out(without)
    bench = Bench(tiny, dict(measured))
    errors = Errors()
    logging.getLogger().addHandler(errors)
    for name in names:
        pipe.send((name, None))
        started = time.monotonic()
        outcome: dict[str, Any] = {"status": "ok"}
        try:
            outcome["measured"] = MEASUREMENTS[name].function(bench)
            errors.raise_first()
            bench.measured |= outcome["measured"]
        except NotHere as error:
            outcome = {"status": "not to be had here", "why": str(error)}
        except BaseException as error:
            outcome = {"status": "failed", "why": describe(error), "traceback": traceback.format_exc()}
            outcome["logged"] = errors.tracebacks()
        outcome["seconds"] = round(time.monotonic() - started, 2)
        pipe.send((name, outcome))
        if outcome["status"] == "failed":
            return
        bench.tidy()


class Errors(logging.Handler):
    """What the engine logs and survives: a measurement in which that happens has failed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def raise_first(self) -> None:
        if self.records:
            raise RuntimeError(f"the engine has logged: {self.tracebacks()[0][-300:]}")

    def tracebacks(self) -> list[str]:
        form = logging.Formatter()
        return [form.format(record) for record in self.records[:3]]


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


class Worker:
    """A process, and what it reports.

    method: "fork", which takes no time, or "spawn", which imports everything again.
    """

    def __init__(
        self, names: list[str], tiny: bool, measured: dict[str, Any], method: str, without: str | None = None
    ) -> None:
        context = multiprocessing.get_context(method)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(  # type: ignore[attr-defined]
            target=work, args=(names, tiny, measured, without, theirs)
        )
        self._process.daemon = True  # it does not outlive this one
        self._process.start()
        theirs.close()
        self.pid = self._process.pid

    def message(self, timeout: float) -> tuple[str, dict[str, Any] | None]:
        """A name, and its outcome, or None where it begins. Raises TimeoutError, and EOFError once nobody sends any
        more.
        """
        if not self._pipe.poll(max(0.0, timeout)):
            raise TimeoutError
        message: tuple[str, dict[str, Any] | None] = self._pipe.recv()
        return message

    def end(self) -> str:
        """Kill it and whatever it has started; how it has ended."""
        self._process.join(1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._pipe.close()
        code = self._process.exitcode
        return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"


# The run


class Run:
    """What has been measured so far, in a file that is always whole."""

    def __init__(self, output: Path, tiny: bool, budget: float, outcomes: dict[str, Any]) -> None:
        self.output, self.tiny, self.outcomes = output, tiny, outcomes
        self._deadline = STARTED + budget
        self._method = "fork"

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self._deadline - time.monotonic()

    @property
    def measured(self) -> dict[str, Any]:
        parts = (outcome.get("measured", {}) for outcome in self.outcomes.values())
        return {name: value for part in parts for name, value in part.items()}

    def keep(self, name: str, outcome: dict[str, Any]) -> None:
        self.outcomes[name] = outcome
        found = {
            "shape": "tiny" if self.tiny else "large",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "transformers": transformers.__version__,
            },
            "seconds": round(time.monotonic() - STARTED, 1),
            "ratios": ratios(self.measured),
            "measurements": self.outcomes,
        }
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(self.output)
        print(f"{name}: {outcome['status']} {outcome.get('why', '')} ({outcome.get('seconds', 0)} s)", flush=True)

    def go(self, names: list[str]) -> None:
        for group, members in itertools.groupby(names, key=lambda name: MEASUREMENTS[name].group):
            pending = list(members)
            if group == "smoke":
                self._smoke(pending)
            else:
                self._group(pending, self._deadline)
            if "forked subprocess" in self.outcomes[pending[0]].get("why", ""):  # something here has used the device
                self._method = "spawn"
                self._group(pending, self._deadline)

    def _smoke(self, pending: list[str]) -> None:
        deadline = min(self._deadline, time.monotonic() + SMOKE_BUDGET)
        self._group(pending, deadline)
        failed = [name for name in pending if self.outcomes[name]["status"] not in ("ok", "not to be had here")]
        seen: dict[str, str] = {}
        for name in failed:
            why = self.outcomes[name].get("why", "")
            if why in seen:
                self.keep(name, self.outcomes[name] | {"without": f"not tried: it fails as {seen[why]} does"})
                continue
            seen[why] = name
            tries = {part: self._retry(name, part, deadline) for part in smoke.PARTS}
            self.keep(name, self.outcomes[name] | {"without": tries})

    def _retry(self, name: str, part: str, deadline: float) -> str:
        """How a feature fares without a part of the engine."""
        if deadline - time.monotonic() < 1:
            return "not tried: no time was left"
        worker = Worker([name], self.tiny, self.measured, self._method, part)
        outcome: dict[str, Any] | None = None
        try:
            while outcome is None:
                _, outcome = worker.message(min(FIRST_LIMIT, deadline - time.monotonic()))
        except TimeoutError:
            return "timed out"
        except EOFError:
            return "died"
        finally:
            worker.end()
        return f"{outcome['status']} {outcome.get('why', '')}".strip()

    def _group(self, pending: list[str], deadline: float) -> None:
        """Measure all, in as many processes as it takes; `pending` is left as it is."""
        pending = list(pending)
        while pending and time.monotonic() < deadline:
            worker = Worker(pending, self.tiny, self.measured, self._method)
            pending = pending[self._process(worker, pending, deadline) :]
            worker.end()
        for name in pending:
            self.keep(name, {"status": "skipped", "why": "the budget is used up"})

    def _process(self, worker: Worker, names: list[str], deadline: float) -> int:
        """Of how many there is an outcome, once the process has come to its end."""
        for place, name in enumerate(names):
            limit = MEASUREMENTS[name].limit
            if not place:  # what its group shares is made first
                limit = limit + START_LIMIT if MEASUREMENTS[name].group == "large" else max(limit, FIRST_LIMIT)
            began, has_begun = time.monotonic(), False
            outcome: dict[str, Any] | None = None
            try:
                while outcome is None:
                    allowed = limit if has_begun else FIRST_LIMIT
                    _, outcome = worker.message(min(began + allowed, deadline) - time.monotonic())
                    if not has_begun:
                        print(f"{name}: begins, process {worker.pid}", flush=True)
                    has_begun = True
            except TimeoutError:
                took = round(time.monotonic() - began, 2)
                outcome = {"status": "timed out", "why": f"after {took} s", "seconds": took}
            except (EOFError, OSError):
                if place and not has_begun:  # it died of the one before, or of tidying up: another process goes on
                    return place
                outcome = {"status": "killed", "why": f"the process died: {worker.end()}"}
            self.keep(name, outcome)
            if outcome["status"] in ("failed", "timed out", "killed"):
                return place + 1
        return len(names)


def ratios(measured: dict[str, Any]) -> dict[str, Any]:
    """Every goal with what was reached; None where it was not measured."""
    found = {}
    for name, (kind, goal, function) in GOALS.items():
        try:
            value = function(measured)
        except (KeyError, TypeError, ZeroDivisionError):
            value = None
        met = None if value is None else value >= goal if kind == ">=" else value <= goal
        found[name] = {"value": value, "goal": f"{kind} {goal}", "met": met}
    return found


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds of all, the imports included")
    parser.add_argument("--resume", type=Path, help="an earlier output: what it has is not measured again")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, metavar="NAME", help="these measurements")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on any machine")
    options = parser.parse_args(args)
    outcomes = json.loads(options.resume.read_text())["measurements"] if options.resume else {}
    run = Run(options.output, options.tiny, options.budget, outcomes)
    wanted = [name for name in MEASUREMENTS if options.only is None or name in options.only]
    run.go([name for name in wanted if outcomes.get(name, {}).get("status") != "ok"])
    for name, row in ratios(run.measured).items():
        value = "not measured" if row["value"] is None else f"{row['value']:.3g}"
        print(f"{name:65} {value:>12}  {row['goal']:8} {({True: 'met', False: 'MISSED', None: ''})[row['met']]}")


if __name__ == "__main__":
    main()
