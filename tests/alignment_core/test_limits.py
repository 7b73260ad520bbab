"""What can never be served is refused before anything is computed."""

import pytest

from alignment_core import InvalidRequest, Prompt, SamplingParams
from tests.engines import aligned, make_engine, run_all, token_ids


def test_what_does_not_fit_is_refused_before_any_compute(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=40)
    long = Prompt((tuple(range(5, 200)) * 3,))
    for prompt, params, param in [
        (long, SamplingParams(), "messages"),
        (aligned(2.0), SamplingParams(max_tokens=500), "max_tokens"),
        (aligned(2.0), SamplingParams(max_tokens=400), "max_tokens"),
    ]:
        with pytest.raises(InvalidRequest) as refusal:
            engine.submit(prompt, params, print)
        assert refusal.value.param == param
    assert engine.runner.num_forwards == 0


def test_the_context_counts_the_longest_branch(tiny):
    loaded, _ = tiny
    prompt = aligned(2.0, length=480, extra=25)  # 505 with the principle, 480 without; the context has 512
    (outputs,) = run_all(make_engine(loaded, num_pages=100), [(prompt, SamplingParams(temperature=0, ignore_eos=True))])
    assert len(token_ids(outputs)) == 7
    assert outputs[-1].finish_reason == "length"


def test_without_max_tokens_a_reply_is_as_long_as_context_and_cache_allow(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=8, page_size=16)  # 64 tokens a branch
    params = SamplingParams(temperature=0, ignore_eos=True)
    (outputs,) = run_all(engine, [(aligned(2.0), params)])
    assert len(token_ids(outputs)) == 64 - 39
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("config", [{"max_model_len": 513}, {"max_num_seqs": 0}, {"page_size": 0}], ids=str)
def test_sizes_that_cannot_work_are_refused(tiny, config):
    with pytest.raises(ValueError, match=r"max_model_len|at least"):
        make_engine(tiny[0], num_pages=10, **config)


def test_prompt_and_reply_may_fill_the_context_and_no_more(tiny):
    loaded, _ = tiny
    engine, prompt = make_engine(loaded, num_pages=100), aligned(0, length=500, extra=9)
    (outputs,) = run_all(engine, [(prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))])
    assert len(token_ids(outputs)) == 3
    with pytest.raises(InvalidRequest, match="the context holds 512"):
        engine.submit(prompt, SamplingParams(max_tokens=4), print)
