"""A process that measures, and what its parent hears of it.

The parent imports neither torch nor transformers: a process of its own takes some ten seconds to import them, and the
next one does so while the present one measures.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Outcome = dict[str, Any]  # "status": "ok", "failed", "timed out", "killed", "skipped" or "not to be had here"; "why", …
START_LIMIT = 90.0  # seconds of the imports, or of tidying up between two measurements
KILL_LIMIT = 10.0  # seconds; a process that waits for a broken driver may never end
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal for a process whose parent has died
READY: Outcome = {"status": "ok"}


@dataclass(frozen=True)
class Measurement:
    """A function to call with the process's Bench and `arguments`.

    function: "module:name". limit: seconds. group: the measurements of one group share a process.
    shared: the others of its group need what it makes: it comes first in each of their processes.
    """

    function: str
    limit: float
    group: str
    arguments: tuple[str, ...] = ()
    shared: bool = False


@dataclass(frozen=True)
class Task:
    """without: a part of the engine that is left out."""

    name: str
    measurement: Measurement
    without: str | None = None


class Worker:
    """A process that imports what measurements need, and then waits for its tasks.

    For each task it sends READY before, and its outcome after.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork can't use CUDA once something has touched it here
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid

    def begin(self, tiny: bool, tasks: list[Task]) -> None:
        with contextlib.suppress(BrokenPipeError):  # `outcome` says how it died
            self._pipe.send((tiny, tasks))

    def outcome(self, limit: float, deadline: float) -> Outcome:
        """What it sends next, or why nothing came within `limit` seconds.

        deadline: on the monotonic clock.
        """
        began = time.monotonic()
        seconds = min(limit, deadline - began)
        try:
            if self._pipe.poll(max(0.0, seconds)):
                return json.loads(self._pipe.recv(), parse_constant=lambda _: None)  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return {"status": "killed", "why": f"the process died: {self.end()}"}
        because = "" if seconds == limit else ", where the budget ended"
        took = round(time.monotonic() - began, 2)
        return {"status": "timed out", "why": f"after {took} s{because}", "seconds": took}

    def end(self) -> str:
        """Kill it and whatever it has started; how it has ended."""
        self._process.join(1)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self._process.kill()
        self._process.join(KILL_LIMIT)
        self._pipe.close()
        code = self._process.exitcode
        if code is None:
            return "it can't be killed"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _work(pipe: Connection) -> None:
    if sys.platform == "linux":  # it holds the device's memory, and may hang
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgrp()
    try:
        from gpu_measurements.tasks import perform

        tiny, tasks = pipe.recv()
        perform(tiny, tasks, lambda outcome: pipe.send(json.dumps(outcome, default=str)))
    except BaseException as error:
        pipe.send(json.dumps({"status": "failed", "why": str(error), "traceback": traceback.format_exc()}))
