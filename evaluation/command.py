"""linalign eval: what the ratio does, by task, against a server or in this process."""

import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import CliApp, CliPositionalArg, SettingsConfigDict

from evaluation import follow, hh, personal_preference
from evaluation.checkers import PROMPTS
from evaluation.records import Cell, Record, Records, cells
from evaluation.report import write
from evaluation.target import Target, in_process, remote
from server.settings import Arguments, client_key

Task = Literal["personal-preference", "follow", "hh"]


class EvalSettings(Arguments):
    """Measure what principles and ratios do to a model's replies.

    personal-preference: does it choose the answer that fits a preference (the paper's protocol)? follow: do replies
    keep to principles that a program can check, and what does it cost the text? hh: does a judge prefer aligned
    replies to prompted ones? A run that was cut off goes on where it was.
    """

    model_config = SettingsConfigDict(cli_prog_name="linalign eval")

    task: CliPositionalArg[Task]
    output: Path = Field(description="folder for records.jsonl, results.json, report.md and the figures")
    url: str | None = Field(
        None, description="a server that takes our fields, without /v1; in this process where none is"
    )
    model: str | None = Field(None, description="its name at the server, or what to load, as for linalign serve")
    api_key: str = Field(default_factory=client_key, description="LINALIGN_API_KEY where none is given")
    dtype: str = Field("auto", description="of a model in this process, as for linalign serve")
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = "auto"
    methods: str = Field("linear,cfg,opad,amulet,adaptive", description="comma-separated")
    ratios: str = Field("0,0.5,1,2,3,5,8", description="comma-separated; 0 is prompting")
    alignment_top_ps: str | None = Field(None, description="comma-separated; each method's own where none are")
    temperatures: str = Field("0.5", description="comma-separated; 0 is greedy")
    concurrency: int = Field(16, ge=1, description="requests at once")
    seed: int = Field(0, description="of the order of answers")
    dataset: str | None = Field(
        None,
        description="personal-preference: a file, or kkuusou/personal_preference_eval; hh: a file as HH-RLHF has them; "
        "our own where none is named",
    )
    limit: int | None = Field(None, ge=1, description="questions, prompts or dialogues at most")
    judge_url: str | None = Field(None, description="hh: any OpenAI-compatible server")
    judge_model: str | None = None
    judge_api_key: str = "none"


def main(args: list[str]) -> None:
    settings = CliApp.run(EvalSettings, cli_args=args)
    if settings.task == "hh" and not settings.judge_url:
        sys.exit("linalign eval: hh needs --judge-url URL")
    settings.output.mkdir(parents=True, exist_ok=True)
    asyncio.run(evaluate(settings))


async def evaluate(settings: EvalSettings) -> None:
    """Run what has not been run yet, then write results and report. Raises httpx.HTTPError, LoadingError."""
    masses = _numbers(settings.alignment_top_ps) if settings.alignment_top_ps else (None,)
    asked = cells(settings.methods.split(","), _numbers(settings.ratios), _numbers(settings.temperatures), masses)
    records = Records(settings.output / "records.jsonl")
    async with AsyncExitStack() as stack:
        if settings.url:
            entered = remote(settings.url, settings.model, settings.api_key, settings.concurrency)
        else:
            entered = in_process(settings.model, settings.dtype, settings.quantization, settings.concurrency)
        target = await stack.enter_async_context(entered)
        summary = await _run(settings, target, records, asked, stack)
        name = target.model
    told = settings.model_dump(mode="json", exclude={"api_key", "judge_api_key", "output"})
    result = {"settings": told, "model": name, "summary": summary}
    (settings.output / "results.json").write_text(json.dumps(result) + "\n")
    write(settings.output, f"{settings.task}: {name}", summary, settings.task)


async def _run(
    settings: EvalSettings, target: Target, records: Records, asked: Sequence[Cell], stack: AsyncExitStack
) -> list[Record]:
    match settings.task:
        case "personal-preference":
            rows = _some(personal_preference.load(settings.dataset), settings.limit)
            items = personal_preference.items(rows, settings.seed)
            await personal_preference.run(target, records, asked, items)
            return personal_preference.summary(records, asked, items)
        case "follow":
            num_prompts = min(settings.limit or len(PROMPTS), len(PROMPTS))
            await follow.run(target, records, asked, num_prompts)
            return follow.summary(records, asked, num_prompts)
    assert settings.judge_url
    dialogues = _some(hh.load(Path(settings.dataset or hh.SHIPPED)), settings.limit)
    judge = await stack.enter_async_context(
        remote(settings.judge_url, settings.judge_model, settings.judge_api_key, settings.concurrency)
    )
    await hh.run(target, judge, records, asked, dialogues)
    return hh.summary(records, asked, len(dialogues))


def _some(rows: list[Any], limit: int | None) -> list[Any]:
    """At most so many, from all over the list."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
