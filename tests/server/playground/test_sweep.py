"""Sweep: one ratio after the other, measured as `linalign eval` does."""

import json

import pytest
from playwright.sync_api import expect

from linalign.evaluation import statistics
from tests.server.playground.browsing import ask, plain, set_tokens, text_of

pytestmark = pytest.mark.slow


def test_the_sweep_measures_as_the_evaluation_does(page, url, tmp_path):
    page.get_by_role("link", name="Sweep").click()
    set_tokens(page, 24)
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".status")).to_have_text("All replies are complete.")
    expect(page.locator("figure canvas")).to_have_count(6)
    files = {}
    for kind in ("PNG", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Export {kind}").click()
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    assert files["PNG"].read_bytes().startswith(b"\x89PNG")
    runs = json.loads(files["JSON"].read_text())["runs"]
    assert [run["ratio"] for run in runs] == [0, 0.5, 1, 2, 4, 8]
    for run in runs:
        text = run["text"]
        assert plain(text) == text_of(url, run["ratio"], max_tokens=24)
        assert run["words"] == len(statistics.words_of(text))
        for n in (1, 2, 3):
            assert run[f"distinct_{n}"] == pytest.approx(statistics.distinct([text], n))
        assert run["longest_repetition"] == statistics.longest_repetition(text)
    trace = ask(url, 4, max_tokens=24, alignment_trace=True)["alignment"]
    assert runs[4]["kl"] == pytest.approx(sum(token["kl"] for token in trace) / len(trace), rel=1e-5)
    assert 0 < runs[0]["kl"] < runs[5]["kl"]
    row = page.locator("tbody tr").nth(4).locator("td").all_inner_texts()
    digits = {"kl": 2, "words": 0, "distinct_1": 2, "distinct_2": 2, "distinct_3": 2, "longest_repetition": 0}
    assert row == [f"{runs[4][name]:.{n}f}" for name, n in digits.items()]


def test_statistics_of_texts_equal_the_evaluations(page):
    texts = [
        "",
        "a",
        "a a a a",
        "Don't-stop, don't-stop; DON'T-STOP!",
        "Ünïcödé 日本 ½ x2 _y_",
        "one two one two one two one",
    ]
    values = page.evaluate(
        """async (texts) => {
          const s = await import("/playground/statistics.js");
          return texts.map((t) => [s.wordsOf(t), s.distinct(t, 2), s.longestRepetition(t)]);
        }""",
        texts,
    )
    expected = [[statistics.words_of(t), statistics.distinct([t], 2), statistics.longest_repetition(t)] for t in texts]
    assert values == expected
