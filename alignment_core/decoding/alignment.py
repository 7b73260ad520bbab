"""Linear Alignment and its neighbours as pure functions on tensors: DESIGN section 2, docs/methods.md.

Gao et al., "Linear Alignment: A Closed-form Solution for Aligning Human Preferences without Tuning
and Feedback", ICML 2024, arXiv 2401.11458: extrapolating the logits along the direction that a
principle induces is the closed form of one policy-optimisation step. The plausible set is the
nucleus mask of the authors' implementation, whose mass is 0.8 there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linalign.alignment_core.decoding.methods import starts_from_base
from linalign.alignment_core.transfer import to_device

ADAPTIVE_SCALE = 50.0


def difference(z: Tensor, base: Tensor) -> Tensor:
    """z − base, and 0 where one of them is −inf: a token that a model itself rules out has no direction."""
    return torch.where((z == -torch.inf) | (base == -torch.inf), 0.0, z - base)


def weighted(weights: Tensor, z: Tensor) -> Tensor:
    """weights × z, and 0 where a weight is 0, whatever z is there."""
    return torch.where(weights != 0, weights * z, 0.0)


def opad(now: Tensor, before: Tensor | None) -> Tensor:
    """OPAD (Zhu et al., ICLR 2025): what is to be added to the direction, all [V], at this step.

    before: the direction at the step before. At the first token, where there is none, the direction has no effect.
    """
    return -now if before is None else before


def adaptive(coefficients: Tensor, weights: Tensor, principled: Tensor, base: Tensor) -> Tensor:
    """No token's ratio is greater than ADAPTIVE_SCALE × the Jensen-Shannon divergence (nats) of the two policies:
    the idea of AdaCAD (Wang et al., NAACL 2025), where they agree there is nothing to amplify.

    coefficients, weights: [k]; principled, base: logits, [V].
    """
    log_p, log_q = principled.log_softmax(dim=-1), base.log_softmax(dim=-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergence = sum(torch.where(log > -torch.inf, log.exp() * (log - log_m), 0).sum() for log in (log_p, log_q)) / 2
    return torch.minimum(coefficients, weights * ADAPTIVE_SCALE * divergence)


@dataclass(frozen=True, slots=True)
class Mixing:
    """Which rows of logits make up which sequence, S sequences of up to k principled branches.

    principled: [S, k] int64, row numbers; sequences with fewer branches repeat a row at weight 0.
    weights: [S, k] float32, each line sums to 1.
    coefficients: [S, k] float32.
    base: [S] int64, row numbers; the first principled row where there is no base branch.
    addition: [S, V] float32, what is added to the direction beside; None for nothing.
    """

    principled: Tensor
    weights: Tensor
    coefficients: Tensor
    base: Tensor
    addition: Tensor | None = None

    def __getitem__(self, index: Tensor | slice) -> "Mixing":
        """The mixing of some of the sequences."""
        return Mixing(
            self.principled[index],
            self.weights[index],
            self.coefficients[index],
            self.base[index],
            None if self.addition is None else self.addition[index],
        )

    def to(self, device: torch.device) -> "Mixing":
        """From the host to a device."""
        return Mixing(
            *(to_device(line, device) for line in (self.principled, self.weights, self.coefficients, self.base))
        )

    @classmethod
    def of(
        cls, sequences: Sequence[tuple[Sequence[float], Sequence[float], bool]], may_start_from_base: bool = True
    ) -> "Mixing":
        """The mixing of sequences whose rows follow each other: principled branches, then the base branch if any. The
        tensors are on the host.

        sequences: (weights, coefficients, has a base branch) of each. may_start_from_base: whether a sequence that
        `starts_from_base` is mixed as z_b + Σ (w_i + c_i)(z_i − z_b), which has the same value.
        """
        row, lines, base = 0, [], []
        for weights, coefficients, has_base in sequences:
            line = [(row + i, *pair) for i, pair in enumerate(zip(weights, coefficients, strict=True))]
            row += len(weights) + has_base
            base.append(row - 1 if has_base else line[0][0])
            if may_start_from_base and starts_from_base(coefficients):
                line = [(base[-1], 1.0, 0.0), *((place, 0.0, w + c) for place, w, c in line)]
            lines.append(line)
        k = max(map(len, lines))
        padded = [[*line, *[(line[0][0], 0.0, 0.0)] * (k - len(line))] for line in lines]
        principled, all_weights, all_coefficients = zip(*(zip(*line, strict=True) for line in padded), strict=True)
        return cls(
            principled=torch.tensor(principled),
            weights=torch.tensor(all_weights, dtype=torch.float32),
            coefficients=torch.tensor(all_coefficients, dtype=torch.float32),
            base=torch.tensor(base),
        )


def is_finite(logits: Tensor, mixing: Mixing) -> Tensor:
    """Whether all rows of a sequence are without NaN and ∞, [S] bool; −∞ is how models rule tokens out themselves.

    logits: [rows, V] float32.
    """
    sound = logits.amax(dim=-1) < torch.inf  # NaN is the greatest of all, and not below
    return sound[mixing.principled].all(dim=1) & sound[mixing.base]


def principled_logits(logits: Tensor, mixing: Mixing) -> Tensor:
    """z_p = Σ w_i z_i (section 2, general form).

    logits: [rows, V] float32. Returns [S, V] float32; bit-equal to the one row where k = 1.
    """
    first, *others = mixing.principled.unbind(1)
    if not others:
        return logits[first]
    total = weighted(mixing.weights[:, :1], logits[first])
    for i, rows in enumerate(others, 1):
        total += weighted(mixing.weights[:, i, None], logits[rows])
    return total


def direction(logits: Tensor, mixing: Mixing, tokens: Tensor | None = None) -> Tensor:
    """Σ c_i (z_i − z_b), to be added to the edited z_p (section 2.2 and 2.3, where c_i = w_i r_i).

    logits: [rows, V] float32, never edited. tokens: [S, K] int64, where to compute it; None means all V. Returns
    [S, K] float32; exactly 0 for a sequence without a base branch, and where the model itself says −inf.
    """

    def of(rows: Tensor) -> Tensor:
        return logits[rows] if tokens is None else logits[rows[:, None], tokens]

    base = of(mixing.base)
    total = torch.zeros_like(base)
    for i in range(mixing.principled.shape[1]):
        total += mixing.coefficients[:, i, None] * difference(of(mixing.principled[:, i]), base)
    if mixing.addition is not None:
        total += mixing.addition if tokens is None else mixing.addition.gather(1, tokens)
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
