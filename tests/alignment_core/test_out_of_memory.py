"""A GPU that runs out of memory during a step, simulated by a forward pass that fails beyond a number of tokens."""

import itertools
from contextlib import contextmanager
from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linalign import Prompt, SamplingParams
from linalign.alignment_core.decoding import sampler, static_sampler
from linalign.alignment_core.execution.halving import halve
from linalign.alignment_core.scheduling.scheduler import Row
from linalign.alignment_core.scheduling.sequence import Branch
from tests.alignment_core import test_speculation
from tests.engines import GREEDY, aligned, judge, make_engine, prompts, run_all, token_ids

pytestmark = pytest.mark.slow

CONFIGS = {
    "together": {"page_size": 4, "num_pages": 500, "max_num_batched_tokens": 512},
    "chunked": {"page_size": 4, "num_pages": 500, "max_num_batched_tokens": 13},
    "preempted": {"page_size": 3, "num_pages": 70},
    "overlapped": {"page_size": 3, "num_pages": 500, "static": True},
    "overlapped and preempted": {"page_size": 3, "num_pages": 70, "static": True},
    "pages of one token": {"page_size": 1, "num_pages": 2000},
}


@contextmanager
def memory_for(model, num_tokens, after=True):
    """Make forward passes of more than `num_tokens` tokens fail; yield the sizes of those that failed.

    after: They fail at their end, when all keys are written, instead of at their beginning.
    """
    failed = []

    def forward(_, __, kwargs, *___):
        size = kwargs["input_ids"].shape[1]
        if size > num_tokens:
            failed.append(size)
            raise torch.OutOfMemoryError("injected")

    register = model.register_forward_hook if after else model.register_forward_pre_hook
    hook = register(forward, with_kwargs=True)
    try:
        yield failed
    finally:
        hook.remove()


def requests():
    """Plain and aligned ones, some with two principles, two equal ones that share pages at once, and sampled ones."""
    one, two = (aligned(2.0, extra=extra).principled[0] for extra in (9, 4))
    several = Prompt((one, two), (0.5, 0.5), (2.0, 1.0), aligned(2.0).base)
    drawn = SamplingParams(max_tokens=12, ignore_eos=True, seed=5)
    greedy = [*prompts(), several, aligned(2.0, 33, 3), aligned(2.0, 33, 3)]
    return [(prompt, GREEDY) for prompt in greedy] + [(prompt, drawn) for prompt in (several, aligned(0, 33, 3))]


@pytest.fixture(scope="module")
def undisturbed(tiny):
    """The tokens of the replies to `requests` with enough memory, checked against the oracle."""
    loaded, oracle = tiny
    replies = run_all(make_engine(loaded, num_pages=900), requests())
    for (prompt, params), outputs in zip(requests(), replies, strict=True):
        if params == GREEDY:
            judge(oracle, prompt, outputs)
    return [token_ids(outputs) for outputs in replies]


SHORT = {(1, True), (5, False), (11, True)}  # cases of the short run; the long run has all
CASES = [
    pytest.param(*case, marks=[] if case in SHORT else pytest.mark.long)
    for case in itertools.product((1, 5, 11), (False, True))
]


@pytest.mark.parametrize(("num_tokens", "after"), CASES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_step_that_is_out_of_memory_runs_in_parts_with_equal_tokens(
    tiny, undisturbed, config, num_tokens, after, caplog
):
    loaded, _ = tiny
    engine = make_engine(loaded, **config)
    with memory_for(loaded.model, num_tokens, after) as failed:
        all_outputs = run_all(engine, requests())
    assert len(failed) > 0
    assert sum("runs in two halves" in record.message for record in caplog.records) == len(failed)
    assert [token_ids(outputs) for outputs in all_outputs] == undisturbed
    assert {outputs[-1].finish_reason for outputs in all_outputs} == {"length"}
    assert engine.pool.num_free == engine.pool.num_pages
    assert (engine.scheduler.num_preemptions > 0) == (config["num_pages"] == 70)


@pytest.fixture(scope="module")
def undrafted(few_words):
    """The tokens of the replies without drafts, checked against the oracle."""
    loaded, oracle = few_words
    texts = test_speculation.prompts()
    replies = run_all(make_engine(loaded, num_pages=600), [(text, test_speculation.LONG) for text in texts])
    return [judge(oracle, text, outputs) for text, outputs in zip(texts, replies, strict=True)]


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize(
    "config",
    [{}, {"static": True}, {"page_size": 3, "num_pages": 96}, {"page_size": 3, "num_pages": 96, "static": True}],
)
def test_drafts_are_verified_in_parts(few_words, undrafted, config, num_tokens):
    loaded, _ = few_words
    engine = make_engine(loaded, **{"num_pages": 600, "num_speculative_tokens": 6, **config})
    wanted = [(text, test_speculation.LONG) for text in test_speculation.prompts()]
    with memory_for(loaded.model, num_tokens) as failed:
        all_outputs = run_all(engine, wanted)
    assert len(failed) > 0
    assert [token_ids(outputs) for outputs in all_outputs] == undrafted
    assert engine.stats().num_tokens_accepted > 20
    assert engine.pool.num_free == engine.pool.num_pages
    assert (engine.scheduler.num_preemptions > 0) == ("num_pages" in config)


def test_out_of_memory_for_one_token_ends_the_engine(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100)
    outputs = []
    with memory_for(loaded.model, 0) as failed:
        engine.submit(aligned(2.0), GREEDY, outputs.append)
        with engine:
            engine._thread.join(60)
    assert isinstance(engine.error, torch.OutOfMemoryError)
    assert outputs[-1].finish_reason == "error"
    assert failed[-1] == 1
    assert engine.pool.num_free == 100


class Followers(list):
    """Replaces the followers; only collects their messages."""

    send = list.append


def test_with_followers_a_step_is_not_retried(tiny):
    """Followers would already have run the first attempt."""
    loaded, _ = tiny
    engine = make_engine(replace(loaded, followers=Followers()), num_pages=100)
    engine.submit(aligned(2.0), GREEDY, lambda _: None)
    engine.runner.followers.clear()
    with memory_for(loaded.model, 5), pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert len(engine.runner.followers) == 1


def numbers(outputs):
    """All log-probabilities and token ids that the outputs report, flattened, in order."""

    def flat(value):
        if isinstance(value, tuple):
            return [number for part in value for number in flat(part)]
        return [] if value is None else [value]

    return [number for o in outputs for logprob in o.logprobs or () for number in flat(astuple(logprob))]


@pytest.mark.parametrize("what", ["draw", "log_probabilities"])
@pytest.mark.parametrize(
    "config",
    [{}, {"static": True}, {"num_speculative_tokens": 4}, {"static": True, "num_speculative_tokens": 4}],
    ids=str,
)
def test_a_draw_that_is_out_of_memory_is_split(few_words, monkeypatch, config, what):
    """Any draw of more than one sequence fails here; one sequence at a time always fits."""
    loaded, _ = few_words
    wanted = [
        (prompt, replace(test_speculation.LONG, logprobs=i % 3 or None, trace=i == 4, seed=i, temperature=i % 2))
        for i, prompt in enumerate(test_speculation.prompts())
    ]
    undisturbed = run_all(make_engine(loaded, num_pages=600), wanted)
    engine, failed = make_engine(loaded, num_pages=600, **config), []

    def small(original):
        def drawn(*args):
            next_tokens = args[0].next_tokens if what == "log_probabilities" else args[2]
            if len({sequence for sequence, _ in next_tokens}) > 1:
                failed.append(len(next_tokens))
                raise torch.OutOfMemoryError("injected")
            return original(*args)

        return drawn

    kinds = {"draw": (sampler.Sampler, static_sampler.StaticSampler), "log_probabilities": (sampler, static_sampler)}
    for owner in kinds[what]:
        monkeypatch.setattr(owner, what, small(getattr(owner, what)))
    for outputs, expected in zip(run_all(engine, wanted), undisturbed, strict=True):
        assert token_ids(outputs) == token_ids(expected)
        assert numbers(outputs) == pytest.approx(numbers(expected), abs=1e-5)  # torch sums a single line differently
    assert len(failed) > 20
    assert engine.pool.num_free == engine.pool.num_pages


rows = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=6)


@given(rows)
def test_halves_have_all_tokens_in_order_and_the_same_outputs(sizes):
    whole = [
        Row(Branch(list(range(100 * i, 100 * i + start + length))), start, start + length + drafts, (-1,) * drafts)
        for i, (start, length, drafts) in enumerate(sizes)
    ]
    wanted = [(row, place) for place in (-1, -2, -3) for row in reversed(whole) if row.num_tokens >= -place]
    first, second = halve(whole, wanted)
    positions = [
        [(row.branch.tokens[0], row.start + i, token) for row in part for i, token in enumerate(row.tokens)]
        for part in (whole, first.rows, second.rows)
    ]
    assert positions[0] == positions[1] + positions[2]
    assert abs(len(positions[1]) - len(positions[2])) <= 1
    lines = {}
    for half in (first, second):
        for line, (row, place) in zip(half.lines, half.wanted, strict=True):
            assert any(row is candidate for candidate in half.rows)
            assert -row.num_tokens <= place < 0
            lines[line] = (row.branch.tokens[0], row.end + place)
    assert [lines[i] for i in range(len(wanted))] == [(row.branch.tokens[0], row.end + place) for row, place in wanted]
