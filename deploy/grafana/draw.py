"""Draw the dashboard without Grafana: draw.py PROMETHEUS_URL FILE.png.

Runs all queries of linalign.json like Grafana. Ends with status 1 if a query has no data.
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib

matplotlib.use("Agg")
from matplotlib import dates, pyplot, ticker
from matplotlib.lines import Line2D

DASHBOARD = Path(__file__).parent / "linalign.json"
COLUMNS, CELL = 24, (0.64, 0.32)  # of Grafana's grid; inches
DAY = 86400  # matplotlib's unit of time, in seconds
NOTE = "drawn from the dashboard's own queries to Prometheus by deploy/grafana/draw.py: not a screenshot of Grafana"
COLOURS = {"text": "#333333", "green": "#37872d", "orange": "#e0701b", "red": "#c4162a"}

Series = tuple[str, list[float], list[float]]  # legend, times in seconds since the epoch, values; NaN for gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prometheus")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--scrape-interval", type=int, default=15, help="seconds")
    args = parser.parse_args()

    panels = json.loads(DASHBOARD.read_text())["panels"]
    end = time.time()
    span = (end - 60 * args.minutes, end, args.scrape_interval)
    with httpx.Client(base_url=args.prometheus, timeout=30) as client:
        servers = {f"${label}": all_of(client, label, span) for label in ("job", "instance")}
        series = {panel["id"]: series_of(client, panel, servers, span) for panel in panels}
    draw(panels, series, span, args.picture)
    empty = [
        f"{panel['title']}: {target['expr']}"
        for panel in panels
        for target, results in zip(panel.get("targets", ()), series[panel["id"]], strict=True)
        if not any(math.isfinite(value) for _, _, values in results for value in values)
    ]
    if empty:
        sys.exit("without data:\n" + "\n".join(empty))


def all_of(client: httpx.Client, label: str, span: tuple[float, float, int]) -> str:
    """Grafana's value of a variable that is set to All: a pattern that matches all values of the label."""
    params = {"match[]": "linalign:num_requests_running", "start": span[0], "end": span[1]}
    answer = client.get(f"/api/v1/label/{label}/values", params=params).raise_for_status()
    return "(" + "|".join(re.escape(value).replace("\\", "\\\\") for value in answer.json()["data"]) + ")"


def series_of(
    client: httpx.Client, panel: dict[str, Any], variables: dict[str, str], span: tuple[float, float, int]
) -> list[list[Series]]:
    """The series of each target of a panel. span: Start and end in seconds since the epoch, and the scrape interval."""
    start, end, interval = span
    step = max(interval, round((end - start) / 300))
    window = max(4 * interval, step + interval)  # Grafana's $__rate_interval
    result = []
    for target in panel.get("targets", ()):
        expression = target["expr"].replace("$__rate_interval", f"{window}s")
        for name, value in variables.items():
            expression = expression.replace(name, value)
        query = {"query": expression, "start": start, "end": end, "step": step}
        answer = client.post("/api/v1/query_range", data=query)
        answer.raise_for_status()
        result.append([_series(target, series, step) for series in answer.json()["data"]["result"]])
    return result


def _series(target: dict[str, Any], result: dict[str, Any], step: int) -> Series:
    """A series with NaN in gaps, which Prometheus leaves out."""
    labels = result["metric"]
    legend = re.sub(r"{{\s*(\w+)\s*}}", lambda name: labels.get(name[1], ""), target["legendFormat"])
    times: list[float] = []
    values: list[float] = []
    for when, value in result["values"]:
        if times and when - times[-1] > 1.5 * step:
            times.append(when - step)
            values.append(math.nan)
        times.append(when)
        values.append(float(value))
    return legend, times, values


def draw(
    panels: list[dict[str, Any]], series: dict[int, list[list[Series]]], span: tuple[float, float, int], picture: Path
) -> None:
    look = {"font.size": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    pyplot.rcParams.update(look)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + 1
    figure = pyplot.figure(figsize=(COLUMNS * CELL[0], height * CELL[1]))
    figure.text(0.005, 1 - 0.5 / height, NOTE, va="center", color="#666666")
    for panel in panels:
        at = panel["gridPos"]
        left, top = at["x"] / COLUMNS, 1 - (at["y"] + 1) / height
        figure.text(left + 0.005, top - 0.5 / height, panel["title"], va="center", weight="bold")
        if panel["type"] == "row":
            figure.add_artist(Line2D([0.005, 0.995], [top, top], color="#bbbbbb", linewidth=0.5))
            continue
        below = 2.3 if panel["type"] == "timeseries" else 0.4
        bottom = top - (at["h"] - below) / height
        box = (left + 0.04, bottom, at["w"] / COLUMNS - 0.05, (at["h"] - below - 1.2) / height)
        paint = _graph if panel["type"] == "timeseries" else _stat
        axes = figure.add_axes(box, xlim=(span[0] / DAY, span[1] / DAY))
        paint(axes, panel, [one for target in series[panel["id"]] for one in target])
    figure.savefig(picture, dpi=80)


def _graph(axes: Any, panel: dict[str, Any], series: list[Series]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    if defaults["custom"]["stacking"]["mode"] == "normal" and series:
        times = sorted({when for _, times, _ in series for when in times})
        by_time = [dict(zip(times, values, strict=True)) for _, times, values in series]
        heights = [[one.get(when, 0) for when in times] for one in by_time]
        axes.stackplot([when / DAY for when in times], heights, labels=[name for name, *_ in series])
    else:
        for one in series:
            axes.plot([when / DAY for when in one[1]], one[2], label=one[0], linewidth=1)
    is_flat = not any(value > 0 for _, _, values in series for value in values)
    axes.set_ylim(0, defaults.get("max", 1 if is_flat else None))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, _: formatted(value, defaults["unit"]))
    axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=2, maxticks=6))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
    axes.grid(color="#eeeeee")
    axes.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.14), ncols=3, frameon=False, fontsize=6, handlelength=1)


def _stat(axes: Any, panel: dict[str, Any], series: list[Series]) -> None:
    """Draw the newest value as text over a graph of the earlier ones."""
    defaults = panel["fieldConfig"]["defaults"]
    axes.axis("off")
    for one in series:
        newest = next((value for value in reversed(one[2]) if math.isfinite(value)), math.nan)
        steps = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or newest >= step["value"]]
        colour = COLOURS[steps[-1]["color"]]
        axes.fill_between([when / DAY for when in one[1]], one[2], color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(0)
        text = "–" if math.isnan(newest) else formatted(newest, defaults["unit"])
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=18, color=colour)


def formatted(value: float, unit: str) -> str:
    """A value with its unit, for people. unit: In Grafana's notation."""
    kind, _, name = unit.partition(":")
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    name = {"none": "", "reqps": "req/s", "cps": "/s", "ops": "/s", "s": "s", "bytes": "B"}.get(kind, name)
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and kind in ("bytes", "si"):
            return f"{value / size:.3g} {prefix}{name}"
    return f"{value:.3g} {name}".strip()


if __name__ == "__main__":
    main()
