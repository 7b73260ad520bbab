"""Draws: seeds and end tokens; no base branch at ratio 0."""

from linalign import SamplingParams
from tests.engines import GREEDY, aligned, make_engine, prompts, run_all, token_ids
from tests.oracle import Setting


def test_ratio_zero_is_one_branch(tiny):
    loaded, _ = tiny
    prompt = aligned(0)
    assert prompt.base is None
    (outputs,) = run_all(make_engine(loaded, num_pages=100), [(prompt, GREEDY)])
    assert outputs[-1].usage.branches == 1
    assert outputs[-1].usage.branch_tokens_computed == len(prompt.principled[0]) + 11


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(tiny):
    loaded, _ = tiny
    params = SamplingParams(seed=11, max_tokens=12, ignore_eos=True)
    (alone,) = run_all(make_engine(loaded, num_pages=400), [(aligned(2), params)])
    others = [(prompt, SamplingParams(max_tokens=20)) for prompt in prompts()]
    crowd = run_all(make_engine(loaded, page_size=4, num_pages=400), [*others, (aligned(2), params)])
    assert token_ids(crowd[-1]) == token_ids(alone)
    (other,) = run_all(make_engine(loaded, num_pages=400), [(aligned(2), SamplingParams(seed=12, max_tokens=12))])
    assert token_ids(other) != token_ids(alone)


def test_every_end_of_sequence_id_ends_the_reply(tiny):
    loaded, oracle = tiny
    tokens = oracle.greedy(aligned(2.0), Setting((2.0,)), 12)
    unused = next(id for id in range(300) if id not in tokens)
    params = SamplingParams(
        temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=frozenset({unused, tokens[4]})
    )
    (outputs,) = run_all(make_engine(loaded, num_pages=400), [(aligned(2.0), params)])
    assert token_ids(outputs) == tokens[: tokens.index(tokens[4]) + 1]
    assert outputs[-1].finish_reason == "stop"


def test_choices_of_a_request_are_drawn_independently(tiny):
    loaded, _ = tiny
    engine, outputs = make_engine(loaded, num_pages=400), []
    engine.submit(aligned(2), SamplingParams(seed=11, max_tokens=12, ignore_eos=True), outputs.append, n=2)
    while engine.step():
        pass
    first, second = (token_ids([o for o in outputs if o.choice == choice]) for choice in (0, 1))
    assert len(first) == len(second) == 12
    assert first != second
