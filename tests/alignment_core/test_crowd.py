"""Runs a few of tests/crowds.py; `python -m tests.crowds 1200` runs them for 1,200 seconds."""

import gc
from collections import Counter

import pytest

from tests.counts import counted
from tests.crowds import crowd

pytestmark = pytest.mark.slow

NUM_CROWDS, AT_ONCE = counted(12, 400), 4


@pytest.fixture(scope="module")
def done():
    """Counts over all crowds of this file; checked only if the whole file ran."""
    gc.freeze()  # count_objects need not search the objects that exist already
    total = Counter()
    yield total
    gc.unfreeze()
    if total["crowds"] == NUM_CROWDS:
        for path in ("preemptions", "drafts accepted", "drafts refused", "prefixes hit", "aborts"):
            assert total[path] > 0, path


@pytest.mark.parametrize("first", range(0, NUM_CROWDS, AT_ONCE))
def test_replies_do_not_depend_on_other_requests(tiny, first, done):
    loaded, _ = tiny
    for seed in range(first, first + AT_ONCE):
        done.update(crowd(loaded, seed))
