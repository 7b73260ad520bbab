"""Pages: prefix reuse, and release of pages."""

import pytest

from linalign import Prompt
from linalign.alignment_core.scheduling.kv_cache import PagePool
from linalign.alignment_core.scheduling.sequence import Branch
from tests.engines import GREEDY, aligned, judge, make_engine, run_all, token_ids


def test_prefixes_are_computed_once(tiny):
    """Within a sequence, between requests of one step, and for a later request."""
    loaded, oracle = tiny
    engine = make_engine(loaded, page_size=4, num_pages=400)
    shared = tuple(range(10, 50))
    prompt = Prompt(((*shared, 60, 61, 62, 63, 64),), (1.0,), (2.0,), (*shared, 60))
    first, twin = run_all(engine, [(prompt, GREEDY), (prompt, GREEDY)])
    assert judge(oracle, prompt, first) == judge(oracle, prompt, twin)
    assert first[-1].usage.prefix_cached_tokens == 40
    assert first[-1].usage.branch_tokens_computed == 45 + 1 + 2 * 11
    assert twin[-1].usage.prefix_cached_tokens == 44 + 40
    (later,) = run_all(engine, [(prompt, GREEDY)])
    assert later[-1].usage.prefix_cached_tokens == 44 + 40
    assert token_ids(later) == token_ids(first)


def test_a_second_turn_finds_the_reply_of_the_first(tiny):
    loaded, oracle = tiny
    engine = make_engine(loaded, page_size=4, num_pages=400)
    prompt = aligned(0)
    (first,) = run_all(engine, [(prompt, GREEDY)])
    second = Prompt(((*prompt.principled[0], *token_ids(first), 9, 8, 7),))
    (outputs,) = run_all(engine, [(second, GREEDY)])
    judge(oracle, second, outputs)
    assert outputs[-1].usage.prefix_cached_tokens >= len(prompt.principled[0]) + 4


def test_an_abort_frees_the_pages_before_the_next_step(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100)
    outputs = []
    request = engine.submit(aligned(2.0), GREEDY, outputs.append)
    engine.step()
    assert engine.pool.num_free < 100
    engine.abort(request)
    assert not engine.step()
    assert engine.pool.num_free == 100
    assert outputs[-1].finish_reason == "abort"


@pytest.mark.parametrize("num_computed", [0, 4, 8])
def test_only_computed_pages_are_found_after_a_release(num_computed):
    pool, tokens = PagePool(num_pages=8, page_size=4), list(range(10))
    branch, twin = Branch(tokens), Branch(tokens)
    assert pool.allocate(branch, 10)
    pool.publish(branch, 9)
    branch.num_computed = num_computed
    pool.release(branch)
    assert pool.adopt(twin) == num_computed
