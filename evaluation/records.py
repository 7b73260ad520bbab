"""Results as they come, in a file of JSON lines: a run that was cut off goes on where it was."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Record = dict[str, Any]
Job = Callable[[], Awaitable[Record]]
CLOSE_TO_ZERO = 1e-9


@dataclass(frozen=True, slots=True)
class Cell:
    """One way of decoding. method: one of alignment_core's, or "plain" without the principle, or "prompting" with it
    and without extrapolation. top_p: the plausible set's mass, None for the method's own.
    """

    method: str
    ratio: float
    temperature: float
    top_p: float | None = None

    @property
    def label(self) -> str:
        return self.method if self.top_p is None else f"{self.method} {self.top_p:g}"

    @property
    def key(self) -> str:
        return f"{self.label}/{self.ratio:g}/{self.temperature:g}"

    def fields(self, principle: str) -> dict[str, Any]:
        """The request's. Prompting has a ratio too small to change anything: so its trace knows the base policy."""
        fields: dict[str, Any] = {"temperature": self.temperature, "alignment_trace": True}
        if self.method == "plain":
            return fields
        fields["principle"] = principle
        if self.method == "prompting":
            return {**fields, "alignment_ratio": CLOSE_TO_ZERO, "alignment_top_p": 1}
        fields |= {"alignment_method": self.method, "alignment_ratio": self.ratio}
        return fields if self.top_p is None else {**fields, "alignment_top_p": self.top_p}


def cells(
    methods: Sequence[str],
    ratios: Sequence[float],
    temperatures: Sequence[float],
    top_ps: Sequence[float | None] = (None,),
) -> list[Cell]:
    """Every method at every ratio with every plausible set; ratio 0 is prompting, whatever the method."""
    found = []
    for temperature in temperatures:
        found += [Cell("plain", 0, temperature), Cell("prompting", 0, temperature)]
        found += [
            Cell(method, ratio, temperature, top_p)
            for method in methods
            for top_p in top_ps
            for ratio in ratios
            if ratio
        ]
    return found


class Records:
    """Results by key. A last line that was half written is left out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Record] = {}
        if path.exists():
            *lines, half = path.read_text().split("\n")
            if half:
                path.write_text("".join(line + "\n" for line in lines))
            self._found = {record["key"]: record for record in map(json.loads, lines)}

    def __getitem__(self, key: str) -> Record:
        return self._found[key]

    def __contains__(self, key: str) -> bool:
        return key in self._found

    async def collect(self, jobs: Mapping[str, Job], title: str) -> None:
        """Do what has not been done yet. The first failure ends the run; what is there stays."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress, self._path.open("a") as file:
            bar = progress.add_task(title, total=len(jobs), completed=sum(key in self for key in jobs))

            async def do(key: str, job: Job) -> None:
                record = {"key": key, **await job()}
                self._found[key] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                progress.advance(bar)

            try:
                async with asyncio.TaskGroup() as tasks:
                    for key, job in jobs.items():
                        if key not in self:
                            tasks.create_task(do(key, job))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None  # the others end with it
