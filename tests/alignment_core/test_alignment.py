"""Alignment (docs/design.md, section 2) on tensors, against plain loops."""

import pytest
import torch
from scipy import stats

from linalign import Prompt
from linalign.alignment_core.cpu import vocabulary
from linalign.alignment_core.decoding import candidates as narrowing
from linalign.alignment_core.decoding.alignment import Mixing, direction, log_totals, plausible_set, principled_logits
from linalign.alignment_core.decoding.candidates import candidates
from linalign.alignment_core.decoding.draw import draw_from_candidates, draw_places
from linalign.alignment_core.decoding.draw_settings import DrawSettings, uniform
from linalign.alignment_core.methods import linear
from tests.oracle import Oracle, Setting


def settings(n, numbers=None, mixing=None, **changes):
    """Settings of n plain sequences at temperature 1. changes: One value for all, or a list of n."""
    values = {
        "aligned": False,
        "nucleus_top_p": 1.0,
        "nucleus_temperature": 1.0,
        "temperature": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "top_p": 1.0,
        "uniform": ((torch.arange(n).double() + 0.5) / n) if numbers is None else numbers,
        **changes,
    }
    tensors = {name: torch.as_tensor(value).expand(n).clone() for name, value in values.items()}
    return DrawSettings(mixing, **tensors)


def choose(logits, y, draw_settings):
    """The tokens of the dynamic draw (not of the one in fixed shapes)."""
    return draw_from_candidates(candidates(logits, y, draw_settings), draw_settings)


def everywhere(logits, mixing):
    """The direction at every token of the vocabulary."""
    return direction(logits, mixing, torch.arange(logits.shape[1]).expand(len(mixing.base), -1))


def plausible(y, top_p, temperature):
    n = len(y)
    top_p, temperature = torch.full((n,), top_p), torch.full((n,), temperature)
    return plausible_set(y, log_totals(y, temperature)[1], top_p, temperature)


@pytest.mark.parametrize("ratios", [(2.0,), (0.5,), (1.0, 3.0), (4.0, 0.0, 1.0)])
def test_mixing_equals_the_formula(ratios):
    torch.manual_seed(0)
    k = len(ratios)
    weights = tuple(w / sum(range(1, k + 1)) for w in range(1, k + 1))
    logits = torch.randn(k + 1, 50) * 5
    mixing = Mixing.of([(weights, linear(weights, ratios), True)])
    z = principled_logits(logits, mixing) + everywhere(logits, mixing)
    setting, prompt = Setting(ratios, weights, top_p=float("inf")), Prompt(((1,),) * k, weights, ratios, (1,))
    oracle = object.__new__(Oracle)  # without a model: the logits are given
    expected = oracle.aligned((list(logits[:k].double()), logits[k].double()), prompt, [], setting)
    torch.testing.assert_close(z[0].double().log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_a_plain_row_beside_aligned_ones_is_untouched_to_the_bit():
    logits = torch.randn(6, 1000)
    mixing = Mixing.of([((0.5, 0.5), (1.0, 2.0), True), ((1.0,), (0.0,), False), ((1.0,), (3.0,), True)])
    z = principled_logits(logits, mixing) + everywhere(logits, mixing)
    assert torch.equal(z[1], logits[3])


def test_the_direction_is_free_of_nan_when_edits_are_minus_infinity():
    logits = torch.randn(2, 10)
    mixing = Mixing.of([((1.0,), (5.0,), True)])
    y = principled_logits(logits, mixing)
    y[:, 3] = -torch.inf
    z = y + everywhere(logits, mixing)
    assert not z.isnan().any()
    assert z[0, 3] == -torch.inf


@pytest.mark.parametrize(("top_p", "temperature"), [(0.8, 0.5), (0.3, 1.0), (0.01, 2.0), (0.999, 0.7), (0.8, 1e-6)])
def test_the_plausible_set_is_the_nucleus(top_p, temperature):
    torch.manual_seed(1)
    y = torch.randn(4, 200) * 3
    kept = plausible(y, top_p, temperature)
    for line, row in zip(kept, y, strict=True):
        p = torch.softmax(row.double() / temperature, 0)
        expected = {t for t in range(200) if p[p > p[t]].sum() < top_p}
        assert set(line.nonzero().flatten().tolist()) == expected


def test_a_top_p_of_one_disables_the_mask_but_not_edits():
    y = torch.tensor([[0.0, -200.0, -torch.inf]])
    assert plausible(y, 1.0, 0.5).tolist() == [[True, True, False]]


def test_each_row_has_its_own_settings():
    z = torch.zeros(2, 100)
    z[:, 0] = 1.0
    both = settings(2, top_k=[1, 0], uniform=[0.99, 0.99])
    first, second = draw_places(z, both).tolist()
    assert first == 0
    assert second != 0


@pytest.mark.parametrize(
    ("filters", "support"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"min_p": 0.45}, {0, 1}),
        ({"temperature": 1e-4}, {0}),
        ({"top_p": 1e-45}, {0}),
    ],
)
def test_filters(filters, support):
    z = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log().expand(1000, 5)
    assert set(draw_places(z, settings(1000, **filters)).tolist()) == support


@pytest.mark.parametrize(
    ("filters", "narrows"),
    [
        ({"aligned": True, "nucleus_top_p": 0.8, "temperature": 0.0}, True),
        ({"aligned": True, "nucleus_top_p": 0.999}, True),
        ({"aligned": True, "nucleus_top_p": 0.8, "top_k": 3, "top_p": 0.9}, True),
        ({"aligned": True, "top_p": 0.9}, False),
        ({"nucleus_top_p": 0.8}, True),
        ({"nucleus_top_p": 0.8, "nucleus_temperature": 3.0, "temperature": 3.0}, True),
        ({"min_p": 0.1}, True),
        ({"min_p": 0.1, "top_p": 0.7}, True),
        ({"top_k": 5, "top_p": 0.7, "min_p": 0.05}, True),
        ({"top_k": 4000}, False),
        ({}, False),
    ],
    ids=str,
)
def test_early_exclusion_of_tokens_does_not_change_the_set(filters, narrows, monkeypatch):
    """A draw from the narrowed vocabulary equals a draw from the whole one."""
    torch.manual_seed(2)
    logits = torch.randn(64, 3000) * 4
    aligned = filters.get("aligned", False)
    mixing = Mixing.of([((1.0,), (2.0 * aligned,), aligned)] * 32)
    y, draw_settings = principled_logits(logits, mixing), settings(32, mixing=mixing, **filters)
    sizes, narrow = [], narrowing.narrow

    def watch(y, bounds):
        tokens, of_tokens = narrow(y, bounds)
        sizes.append(tokens.shape[1])
        return tokens, of_tokens

    monkeypatch.setattr(narrowing, "narrow", watch)
    early = choose(logits, y, draw_settings)
    monkeypatch.setattr(narrowing, "floor", lambda y, *_: torch.full((len(y),), -torch.inf))
    assert torch.equal(early, choose(logits, y, draw_settings))
    assert (sizes[0] < 3000) == narrows
    assert sizes[-1] == 3000


@pytest.mark.parametrize("size", [1, 15, 64, 3001])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_kernels_passes_over_a_vocabulary_are_torchs(size, share, monkeypatch):
    torch.manual_seed(4)
    y = (torch.randn(5, size * 3) * 4)[:, ::3]
    y[1, 1:] = -torch.inf
    temperature = torch.tensor([0.5, 1.0, 30.0, 1e-30, 1e30])
    bounds = y.quantile(share, dim=-1).clamp(min=-1e30)
    assert vocabulary.has_kernels(y)
    best, totals = vocabulary.log_totals(y, temperature)
    narrowed = narrowing.narrow(y, bounds)
    assert torch.equal(best, log_totals(y, temperature)[0])
    torch.testing.assert_close(totals, log_totals(y, temperature)[1], atol=1e-5, rtol=1e-6)
    monkeypatch.setattr(vocabulary, "has_kernels", lambda _: False)
    for ours, theirs in zip(narrowed, narrowing.narrow(y, bounds), strict=True):
        assert torch.equal(ours, theirs)


def test_narrow_and_wide_lines_mix():
    torch.manual_seed(3)
    logits = torch.randn(8, 500) * 3
    mixing = Mixing.of([((1.0,), (2.0 * a,), a) for a in (True, False, False, True)])
    y = principled_logits(logits, mixing)
    mixed = settings(
        4,
        mixing=mixing,
        aligned=[True, False, False, True],
        nucleus_top_p=[0.8, 1.0, 0.5, 1.0],
        temperature=[0.0, 1.0, 1.0, 2.0],
    )
    together = choose(logits, y, mixed)
    for i in range(4):
        index = torch.tensor([i])
        assert choose(logits, y[index], mixed[index]) == together[i]


def test_a_draw_survives_logits_that_underflow():
    z = torch.full((10, 50), -1e30)
    z[:, 7] = 0
    z[:, :5] = -torch.inf
    assert set(draw_places(z, settings(10)).tolist()) == {7}
    assert z.argmax(-1).tolist() == [7] * 10


def test_random_numbers_are_uniform_and_depend_on_seed_position_and_choice():
    n = 20_000
    lines = [[uniform(*(i if place == at else 0 for place in range(3))) for i in range(n)] for at in range(3)]
    for numbers in lines:
        assert stats.kstest(numbers, "uniform").pvalue > 1e-4
    assert len(set(map(tuple, lines))) == 3
    assert uniform(-1, 0, 0) != uniform(1, 0, 0)
