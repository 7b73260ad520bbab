"""NaN and −inf in a model: the affected reply ends with an error, and no other reply changes."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from linalign import Prompt, RequestFailed, SamplingParams
from linalign.alignment_core.attention import paged_triton, sdpa
from linalign.alignment_core.attention.paged_batch import LayerAttention, PagedBatch, Plan
from linalign.alignment_core.cpu import attention as cpu_attention
from linalign.alignment_core.cpu.layers import replace_layers
from linalign.alignment_core.execution import model_runner
from linalign.alignment_core.methods import METHODS
from linalign.alignment_core.scheduling.scheduler import Row
from linalign.alignment_core.scheduling.sequence import Branch
from tests.alignment_core.test_pairs import judge as judge_draws
from tests.engines import GREEDY, PROGRAMS, aligned, make_engine, run_all, tiny_pair, token_ids
from tests.engines import judge as judge_greedy
from tests.oracle import Oracle, Setting

pytestmark = pytest.mark.slow

SPOILT = 299  # the token whose embedding is NaN
RULED_OUT = (0, 1, 150, *range(290, 300))  # tokens whose logits the model makes −inf


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (cpu_attention, torch.float32),
        (sdpa, torch.float32),
        (sdpa, torch.float16),
        (sdpa, torch.bfloat16),
        (paged_triton, torch.float32),
        (paged_triton, torch.float16),
    ],
)
def test_keys_beyond_a_querys_context_do_not_affect_it(backend, window, softcap, dtype, monkeypatch):
    monkeypatch.setattr(paged_triton, "PROGRAMS", PROGRAMS)
    spoilt = 22  # position in the last row, which has 30 tokens and 20 queries
    clean, places = attended(backend, window, softcap, dtype)
    for poison in (torch.nan, torch.inf):
        out, _ = attended(backend, window, softcap, dtype, poison, spoilt)
        sees = [row == 2 and spoilt <= place < spoilt + (window or 30) for row, place in places]
        assert sum(sees) > 3
        for line, is_seen in enumerate(sees):
            if is_seen:
                assert not out[line].isfinite().all()
            else:
                assert torch.equal(out[line], clean[line])


def attended(backend, window, softcap, dtype, poison=0.0, spoilt=None):
    """One layer's attention for rows of 9, 5 and 30 tokens.

    poison: Value of all slots that no row has written, and of one value element at position `spoilt` of the last row.
    Returns the output [T, heads, head_dim], and the (row, position) of each query.
    """
    generator, page_size, pages = torch.Generator().manual_seed(0), 4, iter(range(1, 100))
    shapes = [(9, 1), (5, 1), (30, 20)]
    rows = [
        Row(Branch([0] * n, [next(pages) for _ in range(-(-n // page_size))]), n - queries, n) for n, queries in shapes
    ]
    plan = Plan.of(rows, [], page_size)
    pools = [torch.full((20, page_size, 2, 16), poison, dtype=dtype) for _ in range(2)]
    for pool in pools:
        for row in rows:
            slots = [row.branch.pages[place // page_size] * page_size + place % page_size for place in range(row.end)]
            pool.view(-1, 2, 16)[slots] = torch.randn(row.end, 2, 16, generator=generator).to(dtype)
    num_tokens = len(plan.token_ids)
    query = torch.randn(1, 4, num_tokens, 16, generator=generator).to(dtype)
    key, value = (torch.randn(1, 2, num_tokens, 16, generator=generator).to(dtype) for _ in range(2))
    places = list(zip(plan.row.tolist(), plan.position.tolist(), strict=True))
    if spoilt is not None:
        value[0, 1, places.index((2, spoilt)), 3] = poison
    paged = PagedBatch.of(plan, [pools[0]], [pools[1]], {0: LayerAttention(0.25, window, softcap)})
    out, _ = backend.attend(SimpleNamespace(layer_idx=0), query, key, value, None, paged=paged)
    return out[0], places


@pytest.fixture(scope="module")
def spoilt(tokenizer):
    """A model with one token whose embedding is NaN, and the oracle for all other tokens."""
    loaded, oracle = tiny_pair(tokenizer, vocab_size=300)
    with torch.inference_mode():
        loaded.model.get_input_embeddings().weight[SPOILT] = torch.nan
    return loaded, oracle


@pytest.fixture(params=["kernels", "gathering"])
def backend(request, monkeypatch):
    if request.param == "gathering":
        monkeypatch.setattr(model_runner, "_choose_backend", lambda _: sdpa.NAME)
    return request.param


def failed(outputs):
    return outputs[-1].finish_reason == "error" and isinstance(outputs[-1].error, RequestFailed)


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(seed=1, max_tokens=5, top_k=40, top_p=0.9)], ids=["best", "drawn"]
)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.usefixtures("backend")
def test_nan_ends_only_its_own_reply(spoilt, static, params):
    loaded, oracle = spoilt
    engine = make_engine(loaded, num_pages=40, page_size=4, max_num_batched_tokens=64, static=static)
    ids = aligned(2.0).base
    plain, principled = Prompt(((*ids[:9], SPOILT),)), Prompt(((SPOILT, *ids),), (1.0,), (2.0,), ids)
    base = Prompt(((*ids,),), (1.0,), (2.0,), (*ids[:12], SPOILT))
    two = Prompt((ids, (*ids, SPOILT)), (0.5, 0.5), (2.0, 1.0), ids[3:])
    company = [aligned(2.0), aligned(0.0, 17, 3)]
    for _ in range(2):  # the second time, in pages that the first run has left
        replies = run_all(
            engine, [*((p, params) for p in (plain, principled, base, two)), *((p, GREEDY) for p in company)]
        )
        for outputs in replies[:4]:
            assert failed(outputs)
            assert "not finite" in str(outputs[-1].error)
            assert not token_ids(outputs)
        for prompt, outputs in zip(company, replies[4:], strict=True):
            judge_greedy(oracle, prompt, outputs)
    assert engine.alive
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "top_p": 0.5, "alignment_top_p": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("static", [False, True])
def test_a_single_logit_that_is_not_finite_ends_the_reply(tiny, static, params, monkeypatch):
    """In any branch, also where a filter would have excluded the token."""
    engine = make_engine(tiny[0], num_pages=40, static=static)
    draw, params = engine.loop.sampler.draw, SamplingParams(max_tokens=3, seed=1, **params)
    prompts = [(aligned(0.0), 0), *((replace(aligned(2.0), method=m), branch) for m in METHODS for branch in (0, 1))]
    for (prompt, branch), poison in itertools.product(prompts, (torch.nan, torch.inf)):

        def spoiled(logits, next_tokens, branch=branch, poison=poison):
            logits[branch, 7] = poison
            return draw(logits, next_tokens)

        monkeypatch.setattr(engine.loop.sampler, "draw", spoiled)
        (outputs,) = run_all(engine, [(prompt, params)])
        assert failed(outputs), (prompt.method, branch, poison)
        assert not token_ids(outputs)


def test_a_text_that_is_scored_ends_where_nan_begins(spoilt):
    loaded, _ = spoilt
    ids = aligned(0.0).principled[0]
    prompt = Prompt((ids[:1],), given=(*ids[1:7], SPOILT, *ids[7:12]))
    (outputs,) = run_all(make_engine(loaded, num_pages=40), [(prompt, SamplingParams(max_tokens=0, logprobs=0))])
    assert failed(outputs)
    assert token_ids(outputs) == [*ids[1:7], SPOILT]
    assert all(report.logprob <= 0 for output in outputs for report in output.logprobs)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.usefixtures("backend")
def test_a_prefix_before_nan_is_shared_and_correct(spoilt, static):
    """The page before NaN is published in the same chunk, and adopted before NaN is detected."""
    loaded, oracle = spoilt
    engine = make_engine(loaded, num_pages=40, page_size=4, max_num_batched_tokens=16, static=static)
    prefix = aligned(0.0).principled[0][:12]
    spoiling, outputs, after = Prompt(((*prefix, 5, SPOILT, *range(20, 50)),)), [], []
    engine.submit(spoiling, GREEDY, outputs.append)
    engine.step()
    prompt = Prompt(((*prefix, *range(60, 70)),))
    engine.submit(prompt, GREEDY, after.append)
    while engine.step():
        pass
    assert failed(outputs)
    assert after[-1].usage.prefix_cached_tokens == len(prefix)
    judge_greedy(oracle, prompt, after)


def test_pages_of_a_failed_sequence_are_unpublished(spoilt):
    loaded, _ = spoilt
    engine = make_engine(loaded, num_pages=40, page_size=4)
    prompt = Prompt(((*aligned(0.0).principled[0], SPOILT),))
    for _ in range(2):
        (outputs,) = run_all(engine, [(prompt, GREEDY)])
        assert failed(outputs)
        assert outputs[-1].usage.prefix_cached_tokens == 0


class MaskedOracle(Oracle):
    """Uses a very low finite logit instead of −inf, so that float64 arithmetic needs no special cases."""

    def logits(self, ids):
        logits = super().logits(ids)
        logits[:, list(RULED_OUT)] = -600
        return logits


@pytest.fixture(scope="module")
def masking(tokenizer):
    """A model whose head sets some logits to −inf."""
    loaded, oracle = tiny_pair(tokenizer, kernels=False, vocab_size=300)
    head = nn.Linear(32, 300)
    with torch.no_grad():
        head.weight.copy_(loaded.model.lm_head.weight)
        head.bias.zero_()[list(RULED_OUT)] = -torch.inf
    loaded.model.lm_head = head
    replace_layers(loaded.model, "auto")
    return loaded, MaskedOracle(oracle.model)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("ratio", [2.0, -0.5, -3.0])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_that_the_model_rules_out_are_never_drawn(masking, method, ratio, temperature, static):
    loaded, oracle = masking
    engine = make_engine(loaded, num_pages=200, static=static)
    of_one, plain = aligned(ratio), aligned(0.0, 20, 4)
    one = Prompt(of_one.principled, of_one.weights, of_one.ratios, of_one.base, method=method)
    two = Prompt((*one.principled, one.base[:20]), (0.25, 0.75), (ratio, ratio), one.base, method=method)
    params = SamplingParams(
        temperature=temperature, seed=5, max_tokens=8, ignore_eos=True, alignment_top_p=1, logprobs=2, trace=True
    )
    prompts = [one, two, plain]
    for prompt, outputs in zip(prompts, run_all(engine, [(p, params) for p in prompts]), strict=True):
        setting = Setting(prompt.ratios, prompt.weights, temperature=temperature, top_p=1, method=prompt.method)
        assert judge_draws(oracle, prompt, outputs, setting, 0) <= 1
        assert not set(token_ids(outputs)) & set(RULED_OUT)
        for output in outputs:
            for report in output.logprobs:
                assert report.logprob > -60
                assert not report.trace or 0 <= report.trace.kl < 1000


def test_a_structure_of_excluded_tokens_affects_only_its_request(masking):
    loaded, oracle = masking
    engine = make_engine(loaded, num_pages=100)
    bias = SamplingParams(max_tokens=5, logit_bias={7: 100.0})
    prompts = [aligned(2.0), aligned(0.0)]
    everything_out = [(prompts[0], SamplingParams(max_tokens=5, stop_token_ids=frozenset(range(2, 290)), min_tokens=5))]
    nothing, biased, company = run_all(engine, [*everything_out, (prompts[1], bias), (prompts[0], GREEDY)])
    assert failed(nothing)
    assert set(token_ids(biased)) == {7}
    judge_greedy(oracle, prompts[0], company)
