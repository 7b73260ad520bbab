"""Every method against the formula of its paper, in mixed batches and on every path of the engine."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from linalign import Prompt, SamplingParams
from linalign.alignment_core.methods import METHODS, amulet, linear, starts_from_base
from linalign.alignment_core.scheduling.speculation import PromptLookup
from tests.engines import GREEDY, aligned, make_engine, run_all, token_ids
from tests.oracle import Setting, amulet_game

RATIOS = [(2.0,), (0.5,), (-0.5,), (-3.0,), (20.0,), (1.0, 3.0), (-4.0, 0.5), (5.0, -2.0)]


def prompt_of(method, ratios, shift=0):
    base = tuple((7 * i + shift) % 290 + 5 for i in range(24))
    principled = tuple((*base[:5], *range(50 + 20 * k, 57 + 20 * k + k), *base[5:]) for k in range(len(ratios)))
    weights = (1.0,) if len(ratios) == 1 else (0.25, 0.75)
    return Prompt(principled, weights, ratios, base, method=method)


def alike(method, ratio, shift=0):
    """A prompt whose two principled branches each differ from the base in one token only."""
    base = tuple((7 * i + shift) % 290 + 5 for i in range(24))
    principled = tuple((base[0] + 1 + k, *base[1:]) for k in range(2))
    return Prompt(principled, (0.25, 0.75), (ratio, ratio - 5), base, method=method)


def setting_of(prompt, params):
    top_p = METHODS[prompt.method].top_p if params.alignment_top_p is None else params.alignment_top_p
    return Setting(prompt.ratios, prompt.weights, params.temperature, top_p, method=prompt.method)


def test_amulets_loop_has_a_closed_form():
    torch.manual_seed(0)
    context, base = (torch.log_softmax(torch.randn(500, dtype=torch.float64) * 3, dim=-1) for _ in range(2))
    for alpha in (0.0, 0.3, 1.0, 2.0, 2.5, -1.0, -10.0):
        (coefficient,) = amulet((1.0,), (alpha,))
        expected = torch.log_softmax(context + coefficient * (context - base), dim=-1)
        torch.testing.assert_close(amulet_game(context, base, alpha), expected, atol=1e-9, rtol=1e-9)
        assert coefficient > -1
    assert amulet((1.0,), (2.0,))[0] == pytest.approx(4.649, abs=5e-4)  # the value for the paper's defaults


def test_coefficients():
    assert linear((1.0,), (2.0,)) == METHODS["cfg"].coefficients((1.0,), (2.0,)) == (2.0,)
    steering = METHODS["context_steering"].coefficients
    assert steering((1.0,), (2.0,)) == (2.0,)
    assert steering((0.5, 0.5), (1.0, 0.0)) == (0.5, -0.5)  # equals the first context alone
    assert [starts_from_base((c,)) for c in (-0.5, -1.0, -1.01)] == [False, False, True]
    for method, rule in METHODS.items():
        assert rule.coefficients((1.0,), (0.0,)) == (0.0,), method


CONFIGS = {
    "together": {"num_pages": 800},
    "preempted": {"page_size": 4, "num_pages": 130},
    "chunked": {"num_pages": 800, "max_num_batched_tokens": 40},
    "overlapped": {"num_pages": 800, "static": True},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_methods_in_one_batch_equal_their_formulas(tiny, config):
    loaded, oracle = tiny
    engine = make_engine(loaded, **config)
    cases = list(itertools.product(METHODS, RATIOS))
    requests = [
        (prompt_of(method, ratios, shift), replace(GREEDY, alignment_top_p=(None, 0.5)[(shift + shift // 8) % 2]))
        for shift, (method, ratios) in enumerate(cases)
    ]
    requests += [(aligned(0, 20, shift), GREEDY) for shift in range(3)]
    for (prompt, params), outputs in zip(requests, run_all(engine, requests), strict=True):
        assert oracle.check_greedy(prompt, setting_of(prompt, params), token_ids(outputs)) <= 1, (prompt, params)
    if config.get("page_size") == 4:
        assert engine.scheduler.num_preemptions
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_drafts_change_the_reply_of_no_method(tiny, method, temperature, monkeypatch):
    """Drafts of two right tokens and a wrong one. OPAD's direction comes from the previous row or the previous step."""
    loaded, _ = tiny
    prompt, params = prompt_of(method, (2.0,)), replace(GREEDY, temperature=temperature, seed=3, max_tokens=20)
    (expected,) = run_all(make_engine(loaded, num_pages=100), [(prompt, params)])
    tokens = token_ids(expected)

    def draft(self, most):
        begun = len(self._tokens) - len(prompt.principled[0])
        return [*tokens[begun : begun + 2], 1][:most]

    monkeypatch.setattr(PromptLookup, "draft", draft)
    engine = make_engine(loaded, num_pages=100, num_speculative_tokens=4)
    (outputs,) = run_all(engine, [(prompt, params)])
    assert token_ids(outputs) == tokens
    stats = engine.stats()
    assert 0 < stats.num_tokens_accepted < stats.num_tokens_drafted


def test_methods_differ(tiny):
    """No method equals another by mistake, except "cfg", which is "linear" without a plausible set. The branches are
    so similar that the limit of the adaptive ratio is reached.
    """
    _, oracle = tiny
    prompts = {method: alike(method, 20.0, shift=1) for method in METHODS}
    z = {}
    for method, prompt in prompts.items():
        setting = replace(setting_of(prompt, GREEDY), top_p=1.0)
        z[method] = torch.log_softmax(oracle.next_logits(prompt, [7, 8], setting), dim=-1)
    for a in z:
        for b in z:
            same = a == b or {a, b} == {"linear", "cfg"}
            assert torch.allclose(z[a], z[b], atol=1e-6) == same, (a, b)


def test_a_negative_ratio_stays_in_the_base_policys_plausible_set(tiny):
    loaded, _ = tiny
    towards, away = prompt_of("linear", (3.0,)), prompt_of("linear", (-4.0,))
    engine = make_engine(loaded, num_pages=100)
    params = replace(GREEDY, logprobs=20, trace=True, max_tokens=20)
    for prompt, is_more_probable in ((towards, True), (away, False)):
        (outputs,) = run_all(engine, [(prompt, params)])
        reports = [report for output in outputs for report in output.logprobs]
        gained = sum(r.trace.principled.logprob - r.trace.base.logprob for r in reports)
        assert (gained > 0) == is_more_probable
        for report in reports:
            nucleus = report.trace.principled if is_more_probable else report.trace.base
            assert {id for id, _ in report.top} <= {id for id, _ in nucleus.top} or report.trace.num_plausible > 20


def test_a_seeded_reply_follows_its_method(tiny):
    """Every path draws the same tokens, also with a direction of the previous step."""
    loaded, _ = tiny
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=12, ignore_eos=True)
    requests = [(prompt_of(method, (1.5, 1.0)), params) for method in METHODS]
    plain, *others = (
        [token_ids(outputs) for outputs in run_all(make_engine(loaded, **config), requests)]
        for config in CONFIGS.values()
    )
    assert all(other == plain for other in others)
    assert len(set(map(tuple, plain))) > 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [(), tuple(range(100, 170))], ids=["drawn", "scored"])
def test_traces_have_the_policies_of_each_token(tiny, method, given):
    loaded, oracle = tiny
    prompts = [replace(prompt_of(method, ratios), given=given) for ratios in ((2.0,), (-3.0,), (1.0, 3.0))]
    params = replace(GREEDY, logprobs=3, trace=True, max_tokens=0 if given else 8)
    for prompt, outputs in zip(
        prompts, run_all(make_engine(loaded, num_pages=300), [(p, params) for p in prompts]), strict=True
    ):
        ids, setting = token_ids(outputs), setting_of(prompt, params)
        assert len(ids) == len(given) or not given
        for position, report in enumerate(report for output in outputs for report in output.logprobs):
            if given and position % 9:
                continue
            principled, base = oracle._rows(prompt, ids[:position])
            z = oracle.next_logits(prompt, ids[:position], setting).log_softmax(-1)
            of_principled = sum(w * row for w, row in zip(prompt.weights, principled, strict=True)).log_softmax(-1)
            of_base, trace, token = base.log_softmax(-1), report.trace, ids[position]
            assert report.logprob == pytest.approx(float(z[token]), abs=5e-4)
            for opinion, expected in ((trace.principled, of_principled), (trace.base, of_base)):
                assert opinion.logprob == pytest.approx(float(expected[token]), abs=5e-4)
                assert [value for _, value in opinion.top] == pytest.approx(expected.topk(3).values.tolist(), abs=5e-4)
            possible = z > -math.inf
            assert trace.num_plausible == int(possible.sum())
            divergence = float((z.exp() * (z - of_base))[possible].sum())
            assert trace.kl == pytest.approx(divergence, rel=1e-3, abs=1e-3)


def test_a_plain_reply_has_no_trace(tiny):
    (outputs,) = run_all(make_engine(tiny[0], num_pages=100), [(aligned(0), replace(GREEDY, trace=True))])
    assert all(report.trace is None for output in outputs for report in output.logprobs)
    assert sum(len(output.logprobs) for output in outputs) == 12


def test_the_limit_of_an_adaptive_ratio_is_reached(tiny):
    """The limit in docs/methods.md is used: with 20 or without a limit, tokens would differ."""
    loaded, oracle = tiny
    engine, others = make_engine(loaded, num_pages=200), {20.0: 0, math.inf: 0}
    for shift in range(6):
        prompt = alike("adaptive", 20.0, shift)
        (outputs,) = run_all(engine, [(prompt, GREEDY)])
        ids, setting = token_ids(outputs), setting_of(prompt, GREEDY)
        assert oracle.check_greedy(prompt, setting, ids) <= 1
        for scale in others:
            rows = [oracle.next_logits(prompt, ids[:n], replace(setting, scale=scale)) for n in range(len(ids))]
            others[scale] += [int(z.argmax()) for z in rows] != ids
    assert min(others.values()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_whole_numbers_are_numbers(tiny, method):
    loaded, oracle = tiny
    base = tuple(range(10, 34))
    prompt = Prompt(((*base[:5], 50, *base[5:]),), (1,), (2,), base, method=method)
    (outputs,) = run_all(make_engine(loaded, num_pages=100), [(prompt, GREEDY)])
    assert oracle.check_greedy(prompt, setting_of(prompt, GREEDY), token_ids(outputs)) <= 1
