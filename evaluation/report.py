"""Writes a summary as Markdown, with figures in PNG and SVG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from linalign.evaluation.records import Record

mpl.rcParams["svg.hashsalt"] = "linalign"  # makes figures reproducible
COLLAPSED = 0.2  # share of replies that loop or are empty from which a setting counts as useless
IMPLAUSIBLE = 10  # times the perplexity of prompted replies from which text counts as implausible


def write(folder: Path, title: str, summary: Sequence[Record], task: str) -> None:
    """Write report.md and its figures. Raises KeyError for an unknown task."""
    parts = {"personal-preference": _preference, "follow": _follow, "hh": _hh}[task](folder, summary)
    (folder / "report.md").write_text("\n\n".join([f"# {title}", *parts]) + "\n")


def _preference(folder: Path, summary: Sequence[Record]) -> list[str]:
    parts = []
    for temperature in _temperatures(summary):
        selected = [row for row in summary if row["temperature"] == temperature]
        overall = [row for row in selected if row["domain"] == "all"]
        name = f"accuracy-{temperature:g}"
        _lines(
            folder,
            name,
            overall,
            {"accuracy by drawn letter": lambda r: r["drawn"], "by probability": lambda r: r["probability"]},
        )
        rows = [
            [
                row["method"],
                f"{row['ratio']:g}",
                _percent(row["drawn"]),
                _percent(row["probability"]),
                f"{row['unanswered']:.0%}",
            ]
            for row in overall
        ]
        parts += [f"## Temperature {temperature:g}", f"![accuracy]({name}.png)"]
        parts.append(_table(["method", "ratio", "drawn letter", "most probable letter", "no letter"], rows))
        domains = sorted({row["domain"] for row in selected} - {"all"})
        cell = {(row["method"], row["ratio"], row["domain"]): row["probability"][0] for row in selected}
        rows = [
            [row["method"], f"{row['ratio']:g}", *(f"{cell[row['method'], row['ratio'], d]:.0%}" for d in domains)]
            for row in overall
        ]
        parts.append("By domain, most probable letter:\n\n" + _table(["method", "ratio", *domains], rows))
    return parts


def _follow(folder: Path, summary: Sequence[Record]) -> list[str]:
    parts = []
    for temperature in _temperatures(summary):
        selected = [row for row in summary if row["temperature"] == temperature]
        name = f"follow-{temperature:g}"
        _lines(
            folder,
            name,
            selected,
            {
                "adherence": lambda r: r["adherence"],
                "KL(aligned ∥ base), nats a token": lambda r: (r["kl"],) * 3,
                "perplexity under the base policy": lambda r: (r["perplexity"],) * 3,
                "loop or empty": lambda r: (r["loops"] + r["empty"],) * 3,
            },
        )
        names = [
            "method",
            "ratio",
            "follows",
            "KL",
            "perplexity",
            "distinct-1",
            "-2",
            "-3",
            "repeats",
            "loop",
            "empty",
            "words",
        ]
        rows = [
            [
                row["method"],
                f"{row['ratio']:g}",
                _percent(row["adherence"]),
                f"{row['kl']:.2f}",
                f"{row['perplexity']:.1f}",
                *(f"{value:.2f}" for value in row["distinct"]),
                f"{row['longest_repetition']:.1f}",
                f"{row['loops']:.0%}",
                f"{row['empty']:.0%}",
                f"{row['words']:.0f}",
            ]
            for row in selected
        ]
        parts += [f"## Temperature {temperature:g}", f"![adherence and cost]({name}.png)", _table(names, rows)]
        parts.append(_warnings(selected))
        kept = [row for row in selected if row["method"].split()[0] in ("plain", "prompting", "linear")]
        principles = list(kept[0]["by_principle"])
        rows = [[name, *(f"{row['by_principle'][name]:.0%}" for row in kept)] for name in principles]
        heads = [f"{row['method']}, {row['ratio']:g}" if row["ratio"] else row["method"] for row in kept]
        parts.append("By principle, linear alignment:\n\n" + _table(["principle", *heads], rows))
    return parts


def _warnings(rows: Sequence[Record]) -> str:
    """A table of the ratios from which each method's replies collapse, by two criteria."""
    usual = next(row["perplexity"] for row in rows if row["method"] == "prompting")
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        selected = [row for row in rows if row["method"] == method]
        broken = [row["ratio"] for row in selected if row["loops"] + row["empty"] >= COLLAPSED]
        implausible = [row["ratio"] for row in selected if row["perplexity"] >= IMPLAUSIBLE * usual]
        lines.append([method, *(f"{min(ratios):g}" if ratios else "none of these" for ratios in (broken, implausible))])
    heads = ["method", f"{COLLAPSED:.0%} loop or are empty", f"{IMPLAUSIBLE} times the perplexity of prompting"]
    return "Ratios from which text collapses:\n\n" + _table(heads, lines)


def _hh(folder: Path, summary: Sequence[Record]) -> list[str]:
    _lines(folder, "score", summary, {"score against prompting": lambda r: r["score"]})
    rows = [[r["method"], f"{r['ratio']:g}", f"{r['temperature']:g}", _percent(r["score"])] for r in summary]
    return ["![score](score.png)", _table(["method", "ratio", "temperature", "preferred to prompting"], rows)]


def _lines(
    folder: Path,
    name: str,
    rows: Sequence[Record],
    panels: dict[str, Callable[[Record], Sequence[float]]],
) -> None:
    """Plot one panel for each quantity, with a line and its interval for each method. Lines start at prompting."""
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    start = [row for row in rows if row["method"] == "prompting"]
    for ax, (label, of) in zip(axes, panels.items(), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            if method in ("plain", "prompting"):
                continue
            line = [*start, *(row for row in rows if row["method"] == method)]
            ratios, (middle, low, high) = [row["ratio"] for row in line], zip(*map(of, line), strict=True)
            ax.plot(ratios, middle, marker="o", markersize=3, label=method)
            ax.fill_between(ratios, low, high, alpha=0.12)
        for row in rows:
            if row["method"] == "plain":
                ax.axhline(of(row)[0], color="grey", linestyle=":", label="plain")
        ax.set_xlabel("alignment ratio")
        ax.set_title(label, fontsize=10)
    axes[0].legend(fontsize=8)
    for kind in ("png", "svg"):
        figure.savefig(folder / f"{name}.{kind}", dpi=110, metadata={"Date": None} if kind == "svg" else None)


def _temperatures(rows: Sequence[Record]) -> list[float]:
    return sorted({row["temperature"] for row in rows})


def _percent(interval: Sequence[float]) -> str:
    middle, low, high = interval
    return f"{middle:.1%} ({low:.0%}–{high:.0%})"


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
