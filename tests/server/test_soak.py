"""A short run of benchmarks/soak.py. docs/reliability.md reports its long runs."""

import os

import pytest

from benchmarks.soak import DONE, LEFT, NUM_PAGES, REFUSED, soak
from tests.counts import counted

pytestmark = pytest.mark.slow
POOL = min(32, (os.cpu_count() or 1) + 4)  # most threads of asyncio's default executor, started on demand
GROWTH_MB = 40  # caches that are still filling: compiled grammars, chat templates, malloc's own


def test_random_traffic_with_aborts_frees_all_resources():
    report = soak(counted(20, 1200), warm_up=counted(0.5, 0.2))
    before, after = report["after_warm_up"], report["at_the_end"]
    assert set(report["requests"]) == {DONE, LEFT, REFUSED}
    assert min(report["requests"].values()) >= counted(3, 10)
    assert after["free_pages"] == before["free_pages"] == NUM_PAGES
    assert after["open_files"] <= before["open_files"]
    assert after["tasks"] <= before["tasks"]
    assert after["threads"] <= before["threads"] + POOL
    assert after["memory_mb"] <= before["memory_mb"] + GROWTH_MB
