"""A run of measurements in separate processes. Its JSON file is complete after each of them."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_measurements.process import START_LIMIT, Measurement, Outcome, Task, Worker

PARTS = ("compile", "Triton", "graphs")  # parts of the engine that retries leave out, one at a time, in this order
RETRIED = {"smoke": 90.0, "smoke, compiled": 120.0}  # groups with retries; seconds of each, retries included
RETRY_RESERVE = 20.0  # seconds of these that are reserved for retries
DONE = ("ok", "not to be had here")
Ratios = Callable[[dict[str, Any]], dict[str, Any]]


class Run:
    """The outcomes so far, and the measurements to perform until the deadline.

    ratios: Computes the JSON's "ratios" from all measured values. outcomes: Of an earlier run, by name.
    """

    def __init__(
        self,
        measurements: dict[str, Measurement],
        ratios: Ratios,
        output: Path,
        tiny: bool,
        deadline: float,
        outcomes: dict[str, Outcome],
    ) -> None:
        self.measurements, self.output, self.tiny, self.outcomes = measurements, output, tiny, outcomes
        self._ratios = ratios
        self._started = time.monotonic()
        self._deadline = deadline
        self._standby = Worker()

    @property
    def measured(self) -> dict[str, Any]:
        parts = (outcome.get("measured", {}) for outcome in self.outcomes.values())
        return {name: value for part in parts for name, value in part.items()}

    def go(self, names: list[str]) -> None:
        """Perform the measurements without a result, or all if the earlier outcomes are from another machine."""
        earlier = self.outcomes.pop("about", {}).get("measured")
        self._group("about", ["about"], self._deadline)
        now = self.outcomes["about"].get("measured")
        if earlier and now and not same_machine(earlier, now):
            print("The earlier outcomes are left out: they are of another machine, shape or version.", flush=True)
            self.outcomes = {"about": self.outcomes["about"]}
        for group, members in itertools.groupby(names, key=lambda name: self.measurements[name].group):
            pending = [name for name in members if self.outcomes.get(name, {}).get("status") != "ok"]
            if group in RETRIED:
                self._group_with_retries(group, pending)
            else:
                self._group(group, pending, self._deadline)
        self._standby.end()

    def _task(self, name: str, without: str | None = None) -> Task:
        return Task(name, self.measurements[name], without)

    def _group(self, group: str, pending: list[str], deadline: float) -> None:
        """Perform a group. A shared task that fails is retried without a part of the engine, so that others can run."""
        shared = [name for name, one in self.measurements.items() if one.group == group and one.shared]
        own = [name for name in pending if name not in shared]
        if not own:  # only shared measurements were requested
            shared, own = [], pending
        tasks = [self._task(name) for name in own]
        for part in (None, *PARTS):
            try:
                why = self._perform([self._task(name, part) for name in shared], tasks, deadline)
            except SharedTaskFailed as error:
                why = str(error)
                if error.status != "timed out":
                    continue
            break
        unseen = [self._task(name) for name in shared if name not in self.outcomes]
        for task in [*unseen, *tasks]:
            self._keep(task, {"status": "skipped", "why": why})

    def _group_with_retries(self, group: str, pending: list[str]) -> None:
        """Perform the group, then retry each failed measurement, each time without another part of the engine."""
        deadline = min(self._deadline, time.monotonic() + RETRIED[group])
        self._group(group, pending, deadline - RETRY_RESERVE)
        failed = [name for name in pending if self.outcomes[name]["status"] not in (*DONE, "skipped")]
        retries = [self._task(name, part) for name in one_of_each_kind_first(failed, self.outcomes) for part in PARTS]
        why = self._perform([], retries, deadline)
        for task in retries:
            self._keep(task, {"status": "not tried", "why": why})

    def _perform(self, shared: list[Task], tasks: list[Task], deadline: float) -> str:
        """Perform all tasks, in as many processes as needed, with `shared` first in each.

        Removes performed tasks from `tasks`; returns why the others were not performed. Raises SharedTaskFailed.
        """
        num_fruitless = 0  # processes in a row without a result
        while tasks and time.monotonic() < deadline:
            worker, self._standby = self._standby, Worker()
            worker.begin(self.tiny, [*shared, *tasks])
            try:
                num_done = self._listen(worker, shared, tasks, deadline)
            finally:
                worker.end()
            fruitful = any(self.outcomes[task.name]["status"] in DONE for task in tasks[:num_done])
            num_fruitless = 0 if fruitful else num_fruitless + 1
            del tasks[:num_done]
            if shared and num_fruitless == 2:
                return f"two processes in a row have measured nothing after {shared[-1].name!r}"
        return "the budget is used up"

    def _listen(self, worker: Worker, shared: list[Task], tasks: list[Task], deadline: float) -> int:
        """Store the outcomes of one process until it ends. Returns the number of `tasks` with an outcome.

        Raises SharedTaskFailed.
        """
        for place, task in enumerate([*shared, *tasks], -len(shared)):
            ready = worker.outcome(START_LIMIT, deadline)
            if ready["status"] == "ok":
                print(f"{task.name}: begins, process {worker.pid}", flush=True)
                outcome = worker.outcome(task.measurement.limit, deadline)
            elif place > 0:
                print(f"The process has ended after {tasks[place - 1].name!r}: {ready['why']}", flush=True)
                return place
            else:  # the imports, or the cleanup after the shared tasks, did not finish
                task = shared[-1] if shared and not place else task
                outcome = ready | {"why": f"the process went no further: {ready['why']}"}
            self._keep(task, outcome)
            if task in shared and outcome["status"] not in DONE:
                raise SharedTaskFailed(task.name, outcome["status"])
            if ready["status"] != "ok" or outcome["status"] in ("timed out", "killed"):
                return place + 1
        return len(tasks)

    def _keep(self, task: Task, outcome: Outcome) -> None:
        message = f"{outcome['status']} {outcome.get('why', '')}".strip()
        left_out = f" without {task.without}" if task.without else ""
        print(f"{task.name}{left_out}: {message} ({outcome.get('seconds', 0)} s)", flush=True)
        earlier = self.outcomes.get(task.name)
        if task.without and earlier and not task.measurement.shared:
            earlier.setdefault("without", {})[task.without] = message
        elif earlier and worth(earlier) > worth(outcome):
            earlier["again"] = outcome
        elif task.without:
            self.outcomes[task.name] = outcome | {"without": task.without, "with it": earlier}
        else:
            self.outcomes[task.name] = outcome
        self._write()

    def _write(self) -> None:
        result = {
            "seconds": round(time.monotonic() - self._started, 1),
            "ratios": self._ratios(self.measured),
            "measurements": self.outcomes,
        }
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(self.output)


class SharedTaskFailed(Exception):
    """A measurement that the rest of its group needs has failed."""

    def __init__(self, name: str, status: str) -> None:
        super().__init__(f"it needs {name!r}: {status}")
        self.status = status


def worth(outcome: Outcome) -> int:
    """Rank of an outcome: a result is better than a failure, and a failure better than a skipped measurement."""
    return {"ok": 2, "skipped": 0}.get(outcome["status"], 1)


def same_machine(earlier: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two results of "about" are equal except for times."""
    return {name: value for name, value in earlier.items() if not name.endswith(", s")} == {
        name: value for name, value in now.items() if not name.endswith(", s")
    }


def one_of_each_kind_first(names: list[str], outcomes: dict[str, Outcome]) -> list[str]:
    """The names with one of each kind of failure first, so that frequent failures leave time to retry the others."""
    seen: set[str] = set()
    first, rest = [], []
    for name in names:
        kind = outcomes[name].get("kind", outcomes[name]["status"])
        (rest if kind in seen else first).append(name)
        seen.add(kind)
    return first + rest
