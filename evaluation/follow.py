"""Measures how often replies follow principles that a program can check, and the quality of their text."""

import math
import zlib
from collections.abc import Sequence
from functools import partial
from statistics import fmean

from linalign.evaluation.checkers import CHECKABLE, PROMPTS, Checkable
from linalign.evaluation.records import Cell, Job, Record, Records
from linalign.evaluation.statistics import distinct, interval, longest_repetition, loops, words_of
from linalign.evaluation.target import Target

MAX_TOKENS = 80


async def run(target: Target, records: Records, cells: Sequence[Cell], num_prompts: int) -> None:
    jobs: dict[str, Job] = {
        _key(cell, checkable, number): partial(_ask, target, cell, checkable, number)
        for cell in cells
        for checkable in CHECKABLE
        for number in range(num_prompts)
    }
    await records.collect(jobs, "follow")


def _key(cell: Cell, checkable: Checkable, number: int) -> str:
    """The key of a reply. Plain replies are the same for all principles."""
    principle = "-" if cell.method == "plain" else checkable.id
    return f"follow/{cell.key}/{principle}/{number}"


async def _ask(target: Target, cell: Cell, checkable: Checkable, number: int) -> Record:
    choice = await target.chat(
        [{"role": "user", "content": PROMPTS[number]}],
        **cell.fields(checkable.principle),
        max_tokens=MAX_TOKENS,
        seed=zlib.crc32(f"{checkable.id}/{number}".encode()),
    )
    trace = choice["alignment"]
    is_plain = cell.method == "plain"
    return {
        "text": choice["message"]["content"],
        "finish_reason": choice["finish_reason"],
        "tokens": len(trace),
        "base_logprob": sum(step["logprob" if is_plain else "base_logprob"] for step in trace),
        "kl": 0.0 if is_plain else sum(step["kl"] for step in trace),
    }


def summary(records: Records, cells: Sequence[Cell], num_prompts: int) -> list[Record]:
    """One record for each cell: adherence, and measures of text quality."""
    rows_of_summary = []
    for cell in cells:
        pairs = [(checkable, number) for checkable in CHECKABLE for number in range(num_prompts)]
        rows = [records[_key(cell, *pair)] for pair in pairs]
        texts = [row["text"] for row in rows]
        followed = [
            float(checkable.follows(row["text"], row["finish_reason"] != "length"))
            for (checkable, _), row in zip(pairs, rows, strict=True)
        ]
        groups = [texts[i : i + num_prompts] for i in range(0, len(texts), num_prompts)]  # the texts of each principle
        num_tokens = max(sum(row["tokens"] for row in rows), 1)
        by_principle = {
            checkable.id: fmean(followed[i * num_prompts : (i + 1) * num_prompts])
            for i, checkable in enumerate(CHECKABLE)
        }
        rows_of_summary.append(
            {
                "method": cell.label,
                "ratio": cell.ratio,
                "temperature": cell.temperature,
                "adherence": interval(followed, [checkable.id for checkable, _ in pairs]),
                "by_principle": by_principle,
                "distinct": [fmean(distinct(group, n) for group in groups) for n in (1, 2, 3)],
                "longest_repetition": fmean(longest_repetition(text) for text in texts),
                "loops": fmean(map(loops, texts)),
                "empty": fmean(not text.strip() for text in texts),
                "cut_off": fmean(row["finish_reason"] == "length" for row in rows),
                "words": fmean(len(words_of(text)) for text in texts),
                "kl": sum(row["kl"] for row in rows) / num_tokens,
                "perplexity": math.exp(-sum(row["base_logprob"] for row in rows) / num_tokens),
            }
        )
    return rows_of_summary
