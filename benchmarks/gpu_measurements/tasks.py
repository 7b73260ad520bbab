"""The loop of a measuring process: one task after the other, as long as the device works."""

import logging
import pkgutil
import time
import traceback
from collections.abc import Callable

from gpu_measurements.bench import Bench, NotHere
from gpu_measurements.process import READY, Outcome, Task


def perform(tiny: bool, tasks: list[Task], send: Callable[[Outcome], None]) -> None:
    """Send READY before each task and its outcome after it. Raises if the device or a shared result is broken."""
    bench = Bench(tiny)
    errors = Errors()
    logging.getLogger().addHandler(errors)
    for task in tasks:
        send(READY)
        send(outcome_of(task, bench, errors))
        bench.tidy()  # raises if the device is broken; then another process continues
        errors.records.clear()


def outcome_of(task: Task, bench: Bench, errors: "Errors") -> Outcome:
    started = time.monotonic()
    bench.without, bench.partial = task.without, {}
    outcome: Outcome = {"status": "ok"}
    try:
        outcome["measured"] = pkgutil.resolve_name(task.measurement.function)(bench, *task.measurement.arguments)
        bench.synchronize()
        errors.raise_first()
    except NotHere as error:
        outcome = {"status": "not to be had here", "why": str(error)}
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        outcome = {
            "status": "failed",
            "why": f"{type(error).__name__}: {error}"[:500],
            "kind": f"{type(error).__name__} in {frame.name}, line {frame.lineno}",
            "traceback": traceback.format_exc(),
            "logged": errors.tracebacks(),
            "measured before": bench.partial,
        }
    return outcome | {"seconds": round(time.monotonic() - started, 2)}


class Errors(logging.Handler):
    """Collects errors that the engine logs and survives; a task with such an error has failed."""

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
