"""A run of measurements in processes of their own, and its JSON, which is whole after each of them."""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_measurements.process import START_LIMIT, Outcome, Task, Worker

PARTS = ("graphs", "compile", "Triton")  # of the engine, which a retry of a smoke test leaves out
RETRIED = {"smoke": 90.0, "smoke, compiled": 120.0}  # groups, and seconds of each, retries included
RETRY_RESERVE = 20.0  # of those, for nothing but retries
DONE = ("ok", "not to be had here")
Ratios = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Measurement:
    """function, limit, arguments: as a Task has them. group: the measurements of one group share a process.

    shared: the others of its group need what it makes: it comes first in each of their processes.
    """

    function: str
    limit: float
    group: str
    arguments: tuple[str, ...] = ()
    shared: bool = False


class Run:
    """What has been measured so far, and what is to be measured in the seconds that are left.

    ratios: what the JSON says of all that was measured. outcomes: by name, of an earlier run.
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
        """Measure what has no outcome yet; all anew if the outcomes at hand are of another machine."""
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
        measurement = self.measurements[name]
        return Task(name, measurement.function, measurement.limit, measurement.arguments, without)

    def _group(self, group: str, pending: list[str], deadline: float) -> None:
        shared = [self._task(name) for name, one in self.measurements.items() if one.group == group and one.shared]
        tasks = [self._task(name) for name in pending]
        if any(task not in shared for task in tasks):
            tasks = [task for task in tasks if task not in shared]
        else:
            shared = []
        left = self._perform(shared, tasks, deadline)
        unseen = [one for one in shared if one.name not in self.outcomes]
        broken = [one.name for one in shared if one not in unseen and self.outcomes[one.name]["status"] not in DONE]
        why = f"it needs {broken[0]!r}: {self.outcomes[broken[0]]['status']}" if broken else "the budget is used up"
        for task in [*unseen, *left]:
            self._keep(task, {"status": "skipped", "why": why})

    def _group_with_retries(self, group: str, pending: list[str]) -> None:
        """Perform the group, and what fails in it again, each time without another part of the engine."""
        deadline = min(self._deadline, time.monotonic() + RETRIED[group])
        self._group(group, pending, deadline - RETRY_RESERVE)
        failed = [name for name in pending if self.outcomes[name]["status"] not in (*DONE, "skipped")]
        retries = [self._task(name, part) for name in one_of_each_kind_first(failed, self.outcomes) for part in PARTS]
        for task in self._perform([], retries, deadline):
            self._keep(task, {"status": "not tried", "why": "no time was left"})

    def _perform(self, shared: list[Task], tasks: list[Task], deadline: float) -> list[Task]:
        """Perform all in as many processes as it takes, `shared` first in each; returns those that were not begun."""
        while tasks and time.monotonic() < deadline:
            worker, self._standby = self._standby, Worker()
            worker.begin(self.tiny, [*shared, *tasks])
            num_done = self._listen(worker, shared, tasks, deadline)
            worker.end()
            if not num_done:  # what is shared failed
                break
            tasks = tasks[num_done:]
        return tasks

    def _listen(self, worker: Worker, shared: list[Task], tasks: list[Task], deadline: float) -> int:
        """Keep the outcomes of one process until it ends; of how many of `tasks` there is an outcome."""
        for place, task in enumerate([*shared, *tasks], -len(shared)):
            ready = worker.outcome(START_LIMIT, deadline)
            if ready["status"] == "ok":
                print(f"{task.name}: begins, process {worker.pid}", flush=True)
                outcome = worker.outcome(task.limit, deadline)
            elif place > 0:
                print(f"The process ended after {tasks[place - 1].name}: {ready['why']}", flush=True)
                return place
            else:
                outcome = ready | {"why": f"the process did not come to it: {ready['why']}"}
            self._keep(task, outcome)
            if ready["status"] != "ok" or outcome["status"] in ("timed out", "killed"):
                return max(0, place + 1)
            if place < 0 and outcome["status"] not in DONE:
                return 0
        return len(tasks)

    def _keep(self, task: Task, outcome: Outcome) -> None:
        told = f"{outcome['status']} {outcome.get('why', '')}".strip()
        if task.without is None:
            self.outcomes[task.name] = outcome
            print(f"{task.name}: {told} ({outcome.get('seconds', 0)} s)", flush=True)
        else:
            self.outcomes[task.name].setdefault("without", {})[task.without] = told
            print(f"{task.name} without {task.without}: {told}", flush=True)
        found = {
            "seconds": round(time.monotonic() - self._started, 1),
            "ratios": self._ratios(self.measured),
            "measurements": self.outcomes,
        }
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(self.output)


def same_machine(earlier: dict[str, Any], now: dict[str, Any]) -> bool:
    """Of two outcomes of "about": all but times."""
    return {name: value for name, value in earlier.items() if not name.endswith(", s")} == {
        name: value for name, value in now.items() if not name.endswith(", s")
    }


def one_of_each_kind_first(names: list[str], outcomes: dict[str, Outcome]) -> list[str]:
    """So that many failures of one kind leave time for the others."""
    seen: set[str] = set()
    first, rest = [], []
    for name in names:
        kind = outcomes[name].get("kind", outcomes[name]["status"])
        (rest if kind in seen else first).append(name)
        seen.add(kind)
    return first + rest
