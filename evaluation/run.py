"""Runs linalign eval: missing records, then results and report."""

import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from linalign import LoadingError
from linalign.evaluation import follow, hh, personal_preference
from linalign.evaluation.checkers import PROMPTS
from linalign.evaluation.command import EvalSettings
from linalign.evaluation.records import Cell, Record, Records, cells
from linalign.evaluation.report import write
from linalign.evaluation.target import Target, in_process, remote

FAILURES = (httpx.HTTPError, LoadingError)


async def evaluate(settings: EvalSettings) -> None:
    """Run what has no record yet, then write results and report. Raises httpx.HTTPError, LoadingError."""
    all_cells = cells(settings.methods, settings.ratios, settings.temperatures, settings.alignment_top_ps or (None,))
    records = Records(settings.output / "records.jsonl")
    async with AsyncExitStack() as stack:
        if settings.url:
            entered = remote(settings.url, settings.model, settings.api_key, settings.concurrency)
        else:
            entered = in_process(settings.model, settings.dtype, settings.quantization, settings.concurrency)
        target = await stack.enter_async_context(entered)
        summary = await _run(settings, target, records, all_cells, stack)
        name = target.model
    shown = settings.model_dump(mode="json", exclude={"api_key", "judge_api_key", "output"})
    result = {"settings": shown, "model": name, "summary": summary}
    (settings.output / "results.json").write_text(json.dumps(result) + "\n")
    write(settings.output, f"{settings.task}: {name}", summary, settings.task)


async def _run(
    settings: EvalSettings, target: Target, records: Records, all_cells: Sequence[Cell], stack: AsyncExitStack
) -> list[Record]:
    match settings.task:
        case "personal-preference":
            rows = _sample(personal_preference.load(settings.dataset), settings.limit)
            items = personal_preference.make_items(rows, settings.seed)
            await personal_preference.run(target, records, all_cells, items)
            return personal_preference.summary(records, all_cells, items)
        case "follow":
            num_prompts = min(settings.limit or len(PROMPTS), len(PROMPTS))
            await follow.run(target, records, all_cells, num_prompts)
            return follow.summary(records, all_cells, num_prompts)
    assert settings.judge_url
    dialogues = _sample(hh.load(Path(settings.dataset or hh.SHIPPED)), settings.limit)
    judge = await stack.enter_async_context(
        remote(settings.judge_url, settings.judge_model, settings.judge_api_key, settings.concurrency)
    )
    await hh.run(target, judge, records, all_cells, dialogues)
    return hh.summary(records, all_cells, len(dialogues))


def _sample(rows: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` rows, evenly spread over the list."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]
