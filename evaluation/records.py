"""Stores results in a JSON Lines file as they arrive, so that an interrupted run can continue."""

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
    """One way of decoding.

    method: An alignment method, "plain" (no principle), or "prompting" (the principle without extrapolation). top_p:
    The mass of the plausible set; None for the method's default.
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
        """Fields of the request. Prompting has a ratio that is too small for any effect, so that its trace has the base
        policy.
        """
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
    """All combinations. Ratio 0 is the same for all methods and becomes one cell, "prompting"."""
    result = []
    for temperature in temperatures:
        result += [Cell("plain", 0, temperature), Cell("prompting", 0, temperature)]
        result += [
            Cell(method, ratio, temperature, top_p)
            for method in methods
            for top_p in top_ps
            for ratio in ratios
            if ratio
        ]
    return result


class Records:
    """Records by key. An incomplete last line of the file is removed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, Record] = {}
        if path.exists():
            *lines, incomplete = path.read_text().split("\n")
            if incomplete:
                path.write_text("".join(line + "\n" for line in lines))
            self._records = {record["key"]: record for record in map(json.loads, lines)}

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def __contains__(self, key: str) -> bool:
        return key in self._records

    async def collect(self, jobs: Mapping[str, Job], title: str) -> None:
        """Run the jobs that have no record. The first failure ends the run; existing records stay."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress, self._path.open("a") as file:
            bar = progress.add_task(title, total=len(jobs), completed=sum(key in self for key in jobs))

            async def run(key: str, job: Job) -> None:
                record = {"key": key, **await job()}
                self._records[key] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                progress.advance(bar)

            try:
                async with asyncio.TaskGroup() as tasks:
                    for key, job in jobs.items():
                        if key not in self:
                            tasks.create_task(run(key, job))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None  # the other tasks are cancelled
