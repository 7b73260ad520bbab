"""Section 2 on tensors, against plain loops."""

import pytest
import torch
from scipy import stats

from alignment_core.alignment import Mixing, direction, plausible_set, principled_logits
from alignment_core.sampling import Filters, draw, uniform
from tests.oracle import Oracle, Setting

CPU = torch.device("cpu")


def filters(n, temperature=1.0, top_k=0, min_p=0.0, top_p=1.0, numbers=None):
    if numbers is None:
        numbers = (torch.arange(n).double() + 0.5) / n
    full = torch.full((n,), 0.0)
    return Filters(full + temperature, full.long() + top_k, full + min_p, full + top_p, numbers)


@pytest.mark.parametrize("ratios", [(2.0,), (0.5,), (1.0, 3.0), (4.0, 0.0, 1.0)])
def test_mixing_equals_the_formula(ratios):
    torch.manual_seed(0)
    k = len(ratios)
    weights = tuple(w / sum(range(1, k + 1)) for w in range(1, k + 1))
    logits = torch.randn(k + 1, 50) * 5
    mixing = Mixing.plan([(weights, ratios, True)], CPU)
    z = principled_logits(logits, mixing) + direction(logits, mixing)
    expected = Oracle.aligned(
        None, list(logits[:k].double()), logits[k].double(), Setting(ratios, weights, top_p=float("inf"))
    )
    torch.testing.assert_close(z[0].double(), expected, atol=1e-4, rtol=0)


def test_a_plain_row_beside_aligned_ones_is_untouched_to_the_bit():
    logits = torch.randn(6, 1000)
    mixing = Mixing.plan([((0.5, 0.5), (1.0, 2.0), True), ((1.0,), (0.0,), False), ((1.0,), (3.0,), True)], CPU)
    z = principled_logits(logits, mixing) + direction(logits, mixing)
    assert torch.equal(z[1], logits[3])


def test_the_direction_is_free_of_nan_when_edits_are_minus_infinity():
    logits = torch.randn(2, 10)
    mixing = Mixing.plan([((1.0,), (5.0,), True)], CPU)
    y = principled_logits(logits, mixing)
    y[:, 3] = -torch.inf
    z = y + direction(logits, mixing)
    assert not z.isnan().any()
    assert z[0, 3] == -torch.inf


@pytest.mark.parametrize(("top_p", "temperature"), [(0.8, 0.5), (0.3, 1.0), (0.01, 2.0), (0.999, 0.7)])
def test_the_plausible_set_is_the_nucleus(top_p, temperature):
    torch.manual_seed(1)
    y = torch.randn(4, 200) * 3
    kept = plausible_set(y, torch.full((4,), top_p), torch.full((4,), temperature))
    for line, row in zip(kept, y, strict=True):
        p = torch.softmax(row.double() / temperature, 0)
        expected = {t for t in range(200) if p[p > p[t]].sum() < top_p}
        assert set(line.nonzero().flatten().tolist()) == expected


def test_top_p_of_one_switches_the_mask_off_and_edits_never_come_back():
    y = torch.tensor([[0.0, -200.0, -torch.inf]])
    assert plausible_set(y, torch.tensor([1.0]), torch.tensor([0.5])).tolist() == [[True, True, False]]


def test_settings_are_each_rows_own():
    z = torch.zeros(2, 100)
    z[:, 0] = 1.0
    both = Filters(
        torch.tensor([1.0, 1.0]),
        torch.tensor([1, 0]),
        torch.tensor([0.0, 0.0]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([0.99, 0.99]).double(),
    )
    first, second = draw(z, both).tolist()
    assert first == 0
    assert second != 0


@pytest.mark.parametrize(
    ("settings", "support"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}), ({"min_p": 0.45}, {0, 1}), ({"temperature": 1e-4}, {0})],
)
def test_filters(settings, support):
    z = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log().expand(1000, 5)
    assert set(draw(z, filters(1000, **settings)).tolist()) == support


def test_a_draw_survives_logits_that_underflow():
    z = torch.full((10, 50), -1e30)
    z[:, 7] = 0
    z[:, :5] = -torch.inf
    assert set(draw(z, filters(10)).tolist()) == {7}
    assert z.argmax(-1).tolist() == [7] * 10


def test_uniform_is_uniform_and_depends_on_all_three():
    n = 20_000
    numbers = torch.arange(n)
    zero = torch.zeros_like(numbers)
    for arguments in [(numbers, zero, zero), (zero, numbers, zero), (zero, zero, numbers)]:
        assert stats.kstest(uniform(*arguments).numpy(), "uniform").pvalue > 1e-4
    assert not torch.equal(uniform(numbers, zero, zero), uniform(zero, numbers, zero))
