"""Requests that can never be served are refused before anything is computed."""

import copy
import re
from dataclasses import replace

import pytest
from transformers import AddedToken

from linalign import InvalidRequest, Prompt, SamplingParams, load
from linalign.alignment_core.request import Structure
from tests.engines import GREEDY, aligned, judge, make_engine, run_all, tiny_pair, token_ids


def test_prompts_that_do_not_fit_are_refused_before_compute(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=40)
    long = Prompt((tuple(range(5, 200)) * 3,))
    for prompt, params, field, code in [
        (long, SamplingParams(), "prompt", "too_long"),
        (aligned(2.0, length=400), SamplingParams(max_tokens=1), "prompt", "too_long"),  # fits the context only
    ]:
        with pytest.raises(InvalidRequest) as refusal:
            engine.submit(prompt, params, print)
        assert (refusal.value.field, refusal.value.code) == (field, code)
    assert engine.runner.num_forwards == 0


def test_the_context_counts_the_longest_branch(tiny):
    loaded, _ = tiny
    prompt = aligned(2.0, length=480, extra=25)  # 505 with the principle, 480 without; the context has 512
    (outputs,) = run_all(make_engine(loaded, num_pages=100), [(prompt, SamplingParams(temperature=0, ignore_eos=True))])
    assert len(token_ids(outputs)) == 7
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("max_tokens", [None, 400, 1000])
def test_a_reply_is_at_most_as_long_as_context_and_cache_allow(tiny, max_tokens):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=8, page_size=16)  # 64 tokens per branch
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
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
    (outputs,) = run_all(engine, [(prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))])
    assert len(token_ids(outputs)) == 3


BEFORE, PRINCIPLED = tuple(range(5, 25)), tuple(range(30, 60))


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(((*BEFORE, 300),)),
        Prompt(((-1, *BEFORE),)),
        Prompt((PRINCIPLED,), (1.0,), (2.0,), (*BEFORE, 300)),
        Prompt((PRINCIPLED, (*PRINCIPLED, 10**12)), (0.5, 0.5), (2.0, 2.0), BEFORE),
        Prompt((BEFORE,), given=(7, 300)),
        Prompt((BEFORE,), given=(-2,)),
        Prompt(((),)),
        Prompt((PRINCIPLED,), (1.0,), (2.0,), ()),
    ],
    ids=["beyond", "negative", "base", "second principle", "given", "given negative", "empty", "empty base"],
)
def test_a_prompt_that_the_model_has_no_embedding_for_is_refused(tiny, prompt):
    loaded, oracle = tiny
    engine = make_engine(loaded, num_pages=40)
    with pytest.raises(InvalidRequest, match=r"no token|empty") as refusal:
        engine.submit(prompt, GREEDY, print)
    assert refusal.value.field == "prompt"
    assert engine.runner.num_forwards == 0
    (outputs,) = run_all(engine, [(aligned(2.0), GREEDY)])
    judge(oracle, aligned(2.0), outputs)


@pytest.fixture(scope="module")
def with_a_token_more(tokenizer):
    """A model whose tokenizer has one more token than the embedding. The token also ends replies."""
    tokenizer = copy.deepcopy(tokenizer)
    num_tokens = len(tokenizer)
    tokenizer.add_tokens([AddedToken("[PAD]", special=True)])
    loaded, oracle = tiny_pair(tokenizer, vocab_size=num_tokens)
    return replace(loaded, eos_token_ids=frozenset({2, num_tokens})), oracle


def test_a_tokenizer_with_a_token_more_than_the_model(with_a_token_more):
    loaded, oracle = with_a_token_more
    engine = make_engine(loaded, num_pages=100)
    with pytest.raises(InvalidRequest, match="the model has no token 49152"):
        engine.submit(engine.prompts.build_text("Hello [PAD]"), GREEDY, print)
    assert engine.runner.num_forwards == 0
    prompt = engine.prompts.build([{"role": "user", "content": "Hello [PAD]"}])  # as text, not as the token
    structure = Structure("regex", "[a-z]{4} [0-9]+")
    params = [GREEDY, replace(GREEDY, ignore_eos=False, min_tokens=5), replace(GREEDY, structure=structure)]
    greedy, least, structured = run_all(engine, [(prompt, p) for p in params])
    judge(oracle, prompt, greedy)
    judge(oracle, prompt, least, min_tokens=5, stop_ids=(2,))
    assert re.fullmatch("[a-z]{4} [0-9]*", "".join(output.text for output in structured))


def test_loading_warns_of_tokens_that_the_model_does_not_have(with_a_token_more, tmp_path, caplog):
    loaded, _ = with_a_token_more
    tiny_pair(loaded.tokenizer, vocab_size=49152, kernels=False)[0].model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    load(str(tmp_path))
    assert "no embedding for 1 tokens of its tokenizer, such as '[PAD]'" in caplog.text
