"""Some of tests/crowds.py; `python -m tests.crowds 1200` runs them for as long as you like."""

import gc
from collections import Counter

import pytest

from tests.counts import counted
from tests.crowds import crowd

pytestmark = pytest.mark.slow

NUM_CROWDS, AT_ONCE = counted(12, 400), 4


@pytest.fixture(scope="module")
def done():
    """What all crowds together did on the way; asked of the whole file only."""
    gc.freeze()  # what is there already takes long to look through
    total = Counter()
    yield total
    gc.unfreeze()
    if total["crowds"] == NUM_CROWDS:
        for path in ("preemptions", "drafts accepted", "drafts refused", "prefixes hit", "aborts"):
            assert total[path] > 0, path


@pytest.mark.parametrize("first", range(0, NUM_CROWDS, AT_ONCE))
def test_nobody_notices_the_others(tiny, first, done):
    loaded, _ = tiny
    for seed in range(first, first + AT_ONCE):
        done.update(crowd(loaded, seed))
