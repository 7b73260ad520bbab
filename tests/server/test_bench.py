"""`linalign bench` against a real server."""

import json
import re

import pytest

from linalign.server.commands.bench import Measured, summary
from tests import fork_server


def bench(*args, **options):
    return fork_server.run(
        "from linalign.server.commands.main import main; main()", "bench", *args, check=True, **options
    )


@pytest.mark.parametrize(
    "load", [("--concurrency", "3"), ("--request-rate", "20"), ("--principle", "Be brief.", "--alignment-ratio", "1")]
)
def test_bench_measures_a_server(url, tmp_path, load):
    file = tmp_path / "result.json"
    args = ["--requests", "4", "--warmup", "1", "--max-tokens", "5", "--output", str(file), *load]
    done = bench(url, *args)
    result = json.loads(file.read_text())
    assert "5/5" in done.stderr  # the progress bar
    rows = {cells[0].strip(): cells[1:] for cells in re.findall(r"^│(.*)│(.*)│(.*)│(.*)│$", done.stdout, re.M)}
    assert [float(cell) for cell in rows["whole reply"]] == [round(v, 1) for v in result["end_to_end_ms"].values()]
    assert (result["requests"], result["failures"], result["model"]) == (4, [], "smollm2")
    assert 4 <= result["completion_tokens"] <= 20
    assert result["prompt_tokens"] > 4 * 40
    ttft, total = result["time_to_first_token_ms"], result["end_to_end_ms"]
    assert 0 < ttft["p50"] <= total["p50"] <= total["p99"] <= result["wall_s"] * 1e3


def test_failures_are_counted_and_not_averaged(url, tmp_path):
    file = tmp_path / "result.json"
    args = ["--requests", "2", "--warmup", "0", "--principle", "too long " * 8192, "--output", str(file)]
    printed = bench(url, *args, cold=True).stdout
    assert printed.count("400: ") == 2
    result = json.loads(file.read_text())
    assert result["requests"] == 0
    assert len(result["failures"]) == 2
    assert result["failures"][0].startswith("400")
    assert result["end_to_end_ms"] is None


def test_the_summary_has_percentiles():
    first = Measured(arrivals=[0.1, 0.2, 0.4], total=0.5, prompt_tokens=7, completion_tokens=3)
    second = Measured(arrivals=[0.3, 0.4], total=0.5, prompt_tokens=8, completion_tokens=2)
    result = summary([first, second, Measured(error="500")], wall=2.0)
    assert result["tokens_per_s"] == 2.5
    assert result["time_to_first_token_ms"]["p50"] == 200
    assert result["inter_token_ms"]["p50"] == 100
    assert result["failures"] == ["500"]
