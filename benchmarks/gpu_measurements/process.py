"""A process that measures, and the messages that it sends to its parent.

The parent imports neither torch nor transformers. Importing them takes a process about ten seconds, so the next process
does it while the current one measures.
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
START_LIMIT = 90.0  # seconds for the imports, or for the cleanup between two measurements
KILL_LIMIT = 10.0  # seconds to wait after SIGKILL; a process blocked in a broken driver may never end
PR_SET_PDEATHSIG = 1  # option of Linux's prctl: the signal that a process gets when its parent dies
READY: Outcome = {"status": "ok"}


@dataclass(frozen=True)
class Measurement:
    """A function to call with the process's Bench and `arguments`."""

    function: str  # "module:name"
    limit: float  # seconds
    group: str  # the measurements of one group share a process
    arguments: tuple[str, ...] = ()
    shared: bool = False  # whether the rest of its group needs it: it runs first in each of their processes


@dataclass(frozen=True)
class Task:
    """A measurement to perform."""

    name: str
    measurement: Measurement
    without: str | None = None  # part of the engine to leave out


class Worker:
    """A process that imports everything that measurements need, and then waits for its tasks.

    It sends READY before each task, and the task's outcome after it.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process can't use CUDA if this one has used it
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(target=_work, args=(child_end,), daemon=True)
        self._process.start()
        child_end.close()
        self.pid = self._process.pid

    def begin(self, tiny: bool, tasks: list[Task]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process has died; `outcome` will report how
            self._pipe.send((tiny, tasks))

    def outcome(self, limit: float, deadline: float) -> Outcome:
        """The next outcome that it sends; "timed out" after `limit` seconds or at the deadline, "killed" if it died.

        deadline: On the monotonic clock.
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
        """Kill the process and all that it has started. Returns its exit status or signal as text."""
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
    if sys.platform == "linux":  # end with the parent, because this process holds the device's memory and may hang
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgrp()
    try:
        from gpu_measurements.tasks import perform

        tiny, tasks = pipe.recv()
        perform(tiny, tasks, lambda outcome: pipe.send(json.dumps(outcome, default=str)))
    except BaseException as error:
        pipe.send(json.dumps({"status": "failed", "why": str(error), "traceback": traceback.format_exc()}))
