"""Prompt lookup: what it drafts, and that drafts do not change replies."""

from dataclasses import replace

import pytest

from linalign import Principle, SamplingParams
from linalign.alignment_core.scheduling.speculation import PromptLookup
from tests.engines import FEW_WORDS, GREEDY, aligned, judge, make_engine, run_all, token_ids

pytestmark = pytest.mark.slow

LONG = replace(GREEDY, max_tokens=40)


def prompts():
    return [
        replace(p, principled=(few(p.principled[0]),), base=p.base and few(p.base))
        for p in (aligned(ratio, 10 + 11 * i, i) for i, ratio in enumerate([0, 0.5, 2, 5, 0, 2, 1, 2]))
    ]


def few(ids):
    return tuple(id * id % FEW_WORDS for id in ids)


def test_drafts_repeat_the_last_continuation():
    tokens = [1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8, 1, 2, 3]
    lookup = PromptLookup(tokens)
    assert lookup.draft(2) == [7, 8]
    assert lookup.draft(4) == [7, 8, 1, 2]
    tokens += [6]
    assert lookup.draft(4) == []
    tokens += [4, 5]
    assert lookup.draft(3) == [9, 1, 2]


def test_a_match_at_the_end_of_the_context_repeats_its_period():
    assert PromptLookup([5, 6, 7, 5, 6, 7, 5, 6]).draft(4) == [7, 5, 6, 7]
    assert PromptLookup([5, 5, 5, 5]).draft(3) == [5, 5, 5]


def test_drafts_grow_while_they_are_right_and_pause_while_they_are_wrong():
    tokens = [5] * 10
    lookup = PromptLookup(tokens)
    assert len(lookup.draft(64)) == 4
    lookup.learn(4, 4)
    assert len(lookup.draft(64)) == 8
    lookup.learn(8, 2)
    assert len(lookup.draft(64)) == 3
    for pause in (1, 3, 7, 15, 31, 31):
        lookup.learn(1, 0)
        lengths = []
        for _ in range(pause + 1):
            assert lookup.may_draft_next() == (len(lengths) == pause)
            lengths.append(len(lookup.draft(64)))
            tokens.append(5)
        assert lengths == [0] * pause + [1]


def test_an_announced_draft_that_is_missing_counts_as_a_miss():
    tokens = [1, 2, 3, 4, 9, 1, 2, 3]
    lookup = PromptLookup(tokens)
    tokens.append(-1)  # placeholder of a token that is being drawn
    assert lookup.may_draft_next()  # 1 2 3 has occurred before
    tokens[-1] = 8  # 1 2 3 8 has not
    assert lookup.draft(8) == []
    tokens += [1, 2, -1]
    assert lookup.may_draft_next()
    tokens[-1] = 7
    assert lookup.draft(8) == []
    tokens += [1, 2]
    assert not lookup.may_draft_next()  # drafting pauses


@pytest.mark.parametrize(
    "config",
    [
        {"page_size": 4, "num_pages": 600},
        {"page_size": 4, "num_pages": 600, "max_num_batched_tokens": 20},
        {"page_size": 3, "num_pages": 96},
        {"page_size": 1, "num_pages": 2000, "max_num_seqs": 2},
        {"page_size": 3, "num_pages": 96, "static": True},
    ],
    ids=["together", "chunked", "preempted", "few at once", "overlapped"],
)
def test_greedy_replies_equal_the_oracle(few_words, config):
    loaded, oracle = few_words
    engine = make_engine(loaded, num_speculative_tokens=6, **config)
    longer = replace(LONG, max_tokens=50)
    for prompt, outputs in zip(prompts(), run_all(engine, [(prompt, longer) for prompt in prompts()]), strict=True):
        assert len(judge(oracle, prompt, outputs)) == 50
        assert outputs[-1].usage.completion_tokens == 50
    stats = engine.stats()
    assert stats.num_tokens_drafted > stats.num_tokens_accepted > 20
    assert engine.pool.num_free == engine.pool.num_pages
    assert (engine.scheduler.num_preemptions > 0) == (config["num_pages"] == 96)


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.2}, {"temperature": 0.3, "top_p": 0.7}, {"temperature": 0.4, "top_k": 4, "min_p": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("config", [{}, {"static": True}, {"static": True, "page_size": 3, "num_pages": 90}], ids=str)
def test_seeded_replies_are_equal_with_and_without_drafts(few_words, params, config):
    loaded, _ = few_words
    wanted = [(prompt, replace(LONG, seed=seed, **params)) for seed, prompt in enumerate(prompts())]
    without = run_all(make_engine(loaded, num_pages=600), wanted)
    engine = make_engine(loaded, **{"num_pages": 600, "num_speculative_tokens": 8} | config)
    assert [token_ids(o) for o in run_all(engine, wanted)] == [token_ids(o) for o in without]
    assert engine.stats().num_tokens_accepted > 20


def test_a_reply_that_ends_within_a_draft_ends_there(few_words):
    loaded, _ = few_words
    prompt = prompts()[2]
    (outputs,) = run_all(make_engine(loaded, num_pages=200), [(prompt, LONG)])
    tokens = token_ids(outputs)
    for length in range(2, 40):
        stop = tokens[length - 1]
        expected = tokens[: tokens.index(stop) + 1]
        engine = make_engine(loaded, num_pages=200, num_speculative_tokens=8)
        for params in (replace(LONG, max_tokens=length), replace(LONG, stop_token_ids=frozenset({stop}))):
            (outputs,) = run_all(engine, [(prompt, params)])
            assert token_ids(outputs) == (tokens[:length] if params.max_tokens == length else expected)
            assert engine.pool.num_free == engine.pool.num_pages


def test_fewer_forwards_where_it_pays_and_no_drafts_where_the_step_is_full(few_words):
    loaded, _ = few_words
    for overlap in (False, True):
        engine = make_engine(loaded, num_pages=600, num_speculative_tokens=8, static=overlap)
        run_all(engine, [(prompts()[2], LONG)])
        assert engine.runner.num_forwards < 38
    full = make_engine(loaded, num_pages=6000, num_speculative_tokens=8, max_num_batched_tokens=4096)
    run_all(full, [(prompts()[2], LONG)] * 33)
    assert full.stats().num_tokens_drafted == 0


def test_the_embedded_model_copies_a_text_in_a_third_of_the_steps(embedded):
    text = (
        "The quick brown fox jumps over the lazy dog. In 1492 Columbus sailed the ocean blue, and 53 sailors came "
        "along. Their names were Pedro, Juan, Alonso, Diego, and Rodrigo, who kept the log of the ship."
    )
    message = [{"role": "user", "content": f"Copy the following text word for word, twice:\n{text}{text}"}]
    params = SamplingParams(temperature=0, max_tokens=40)
    replies, steps = [], []
    for most in (0, 8):
        engine = make_engine(embedded, num_pages=200, num_speculative_tokens=most)
        prompt = engine.prompts.build(message, [Principle("Be exact.", ratio=2.0)])
        (outputs,) = run_all(engine, [(prompt, params)])
        replies.append("".join(output.text for output in outputs))
        steps.append(engine.runner.num_forwards)
    assert replies[0] == replies[1]
    assert text[:60] in replies[0]
    assert steps[1] < steps[0] / 3
