"""Linear Alignment as pure functions on tensors: DESIGN section 2.

Gao et al., "Linear Alignment: A Closed-form Solution for Aligning Human Preferences without Tuning
and Feedback", ICML 2024, arXiv 2401.11458: extrapolating the logits along the direction that a
principle induces is the closed form of one policy-optimisation step. The plausible set is the
nucleus mask of the authors' implementation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mixing:
    """Which rows of logits make up which sequence, S sequences of up to k principled branches.

    principled: [S, k] int64, row numbers; sequences with fewer branches repeat a row at weight 0.
    weights: [S, k] float32, each line sums to 1.
    ratios: [S, k] float32.
    base: [S] int64, row numbers; the first principled row where there is no base branch.
    """

    principled: Tensor
    weights: Tensor
    ratios: Tensor
    base: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Mixing":
        """The mixing of some of the sequences."""
        return Mixing(self.principled[index], self.weights[index], self.ratios[index], self.base[index])

    @classmethod
    def plan(cls, sequences: Sequence[tuple[Sequence[float], Sequence[float], bool]], device: torch.device) -> "Mixing":
        """Number the rows in order: each sequence's principled branches, then its base branch if it has one.

        sequences: (weights, ratios, has a base branch) of each.
        """
        k = max(len(weights) for weights, _, _ in sequences)
        principled, all_weights, all_ratios, base = [], [], [], []
        row = 0
        for weights, ratios, has_base in sequences:
            padding = k - len(weights)
            principled.append([*range(row, row + len(weights)), *[row] * padding])
            all_weights.append([*weights, *[0.0] * padding])
            all_ratios.append([*ratios, *[0.0] * padding])
            base.append(row + len(weights) if has_base else row)
            row += len(weights) + has_base
        return cls(
            principled=torch.tensor(principled, device=device),
            weights=torch.tensor(all_weights, dtype=torch.float32, device=device),
            ratios=torch.tensor(all_ratios, dtype=torch.float32, device=device),
            base=torch.tensor(base, device=device),
        )


def principled_logits(logits: Tensor, mixing: Mixing) -> Tensor:
    """z_p = Σ w_i z_i (section 2, general form).

    logits: [rows, V] float32. Returns [S, V] float32; bit-equal to the one row where k = 1.
    """
    total = logits[mixing.principled[:, 0]]
    if mixing.principled.shape[1] > 1:
        total *= mixing.weights[:, :1]
        for i in range(1, mixing.principled.shape[1]):
            weight = mixing.weights[:, i, None]
            total += torch.where(weight != 0, weight * logits[mixing.principled[:, i]], 0)
    return total


def direction(logits: Tensor, mixing: Mixing, tokens: Tensor | None = None) -> Tensor:
    """Σ w_i r_i (z_i − z_b), to be added to the edited z_p (section 2.2 and 2.3).

    logits: [rows, V] float32, never edited, so that no −inf meets another. tokens: [S, K] int64,
    where to compute it; None means all V. Returns [S, K] float32; exactly 0 for a sequence without a
    base branch.
    """

    def of(rows: Tensor) -> Tensor:
        return logits[rows] if tokens is None else logits[rows[:, None], tokens]

    coefficients = mixing.weights * mixing.ratios
    base = of(mixing.base)
    total = torch.zeros_like(base)
    for i in range(mixing.principled.shape[1]):
        total += coefficients[:, i, None] * (of(mixing.principled[:, i]) - base)
    return total


def log_totals(y: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest logit of each line, and log Σ exp((y − greatest) / temperature): the log of the
    whole mass, the best token's being 1.

    y: [S, V] float32; temperature: [S]. Returns [S] and [S].
    """
    best = y.amax(dim=-1)
    return best, ((y - best[:, None]) / temperature[:, None]).exp_().sum(dim=-1).log_()


def plausible_set(y: Tensor, log_total: Tensor, top_p: Tensor, temperature: Tensor) -> Tensor:
    """The tokens that the principled policy itself would consider (section 2.4).

    y: [S, K] float32, edited principled logits; it may leave tokens out that are too unlikely to be
    in the set (`plausible_floor`). log_total: [S], of the whole vocabulary. top_p, temperature: [S]
    float32. Returns [S, K] bool: in order of falling probability, a token is in while the mass before
    it is below top_p. At least one token is in; ties go to the lower token id; top_p = 1 takes in
    every token whose logit is not −inf.
    """
    ordered, order = torch.sort(y, dim=-1, descending=True, stable=True)
    mass = ((ordered - ordered[:, :1]) / temperature[:, None] - log_total[:, None]).exp()
    before = mass.cumsum(dim=-1) - mass
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(1, order, kept) & (y > -torch.inf)


def plausible_floor(best: Tensor, log_total: Tensor, vocab_size: int, top_p: Tensor, temperature: Tensor) -> Tensor:
    """A logit below which no token is in the plausible set; [S], −inf where top_p = 1.

    best: [S], the greatest logit of each sequence.

    All tokens of probability < ε have a mass < Vε together. So with Vε = 1 − top_p the mass before
    each of them is above top_p. The factor of two is room for rounding.
    """
    return best + temperature * (log_total + ((1 - top_p) / (2 * vocab_size)).log())
