"""A run of measurements in processes of their own, and its JSON, which is whole after each of them."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_measurements.process import START_LIMIT, Measurement, Outcome, Task, Worker

PARTS = ("compile", "Triton", "graphs")  # of the engine, which retries leave out, one at a time; what saves time first
RETRIED = {"smoke": 90.0, "smoke, compiled": 120.0}  # groups, and seconds of each, retries included
RETRY_RESERVE = 20.0  # of those, for nothing but retries
DONE = ("ok", "not to be had here")
Ratios = Callable[[dict[str, Any]], dict[str, Any]]


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
        """Measure what has no number yet, or everything if the earlier outcomes are of another machine."""
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
        """Where a shared task fails, it is tried without a part of the engine: the others are better than nothing."""
        shared = [name for name, one in self.measurements.items() if one.group == group and one.shared]
        own = [name for name in pending if name not in shared]
        if not own:  # only what they would share is wanted
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
        """Perform the group, and what fails in it again, each time without another part of the engine."""
        deadline = min(self._deadline, time.monotonic() + RETRIED[group])
        self._group(group, pending, deadline - RETRY_RESERVE)
        failed = [name for name in pending if self.outcomes[name]["status"] not in (*DONE, "skipped")]
        retries = [self._task(name, part) for name in one_of_each_kind_first(failed, self.outcomes) for part in PARTS]
        why = self._perform([], retries, deadline)
        for task in retries:
            self._keep(task, {"status": "not tried", "why": why})

    def _perform(self, shared: list[Task], tasks: list[Task], deadline: float) -> str:
        """Perform all in as many processes as it takes, `shared` first in each.

        What was performed is taken from `tasks`; returns why the others were not. Raises SharedTaskFailed.
        """
        num_fruitless = 0  # processes in a row
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
        """Keep the outcomes of one process until it ends; of how many of `tasks` there is an outcome.

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
            else:  # tidying up after what is shared, if it is not the imports
                task = shared[-1] if shared and not place else task
                outcome = ready | {"why": f"the process went no further: {ready['why']}"}
            self._keep(task, outcome)
            if task in shared and outcome["status"] not in DONE:
                raise SharedTaskFailed(task.name, outcome["status"])
            if ready["status"] != "ok" or outcome["status"] in ("timed out", "killed"):
                return place + 1
        return len(tasks)

    def _keep(self, task: Task, outcome: Outcome) -> None:
        told = f"{outcome['status']} {outcome.get('why', '')}".strip()
        left_out = f" without {task.without}" if task.without else ""
        print(f"{task.name}{left_out}: {told} ({outcome.get('seconds', 0)} s)", flush=True)
        earlier = self.outcomes.get(task.name)
        if task.without and earlier and not task.measurement.shared:
            earlier.setdefault("without", {})[task.without] = told
        elif earlier and worth(earlier) > worth(outcome):
            earlier["again"] = outcome
        elif task.without:
            self.outcomes[task.name] = outcome | {"without": task.without, "with it": earlier}
        else:
            self.outcomes[task.name] = outcome
        self._write()

    def _write(self) -> None:
        found = {
            "seconds": round(time.monotonic() - self._started, 1),
            "ratios": self._ratios(self.measured),
            "measurements": self.outcomes,
        }
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(self.output)


class SharedTaskFailed(Exception):
    """What the others of its group need is not to be had."""

    def __init__(self, name: str, status: str) -> None:
        super().__init__(f"it needs {name!r}: {status}")
        self.status = status


def worth(outcome: Outcome) -> int:
    """A number beats a failure, and a failure that nothing was done."""
    return {"ok": 2, "skipped": 0}.get(outcome["status"], 1)


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
