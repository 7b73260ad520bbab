"""Linear Alignment and related methods as pure functions on tensors: docs/design.md, section 2, and docs/methods.md.

Gao et al., "Linear Alignment: A Closed-form Solution for Aligning Human Preferences without Tuning and Feedback",
ICML 2024, arXiv 2401.11458: extrapolating the logits along the direction that a principle induces is the closed form
of one policy-optimisation step. The plausible set is the nucleus mask of the authors' implementation, which sets its
mass to 0.8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linalign.alignment_core.methods import starts_from_base
from linalign.alignment_core.transfer import to_device

ADAPTIVE_SCALE = 50.0  # ratio per nat of divergence


def difference(z: Tensor, base: Tensor) -> Tensor:
    """z − base; 0 where one of them is −inf, because a token that the model itself masks has no direction."""
    return torch.where((z == -torch.inf) | (base == -torch.inf), 0.0, z - base)


def weighted(weights: Tensor, z: Tensor) -> Tensor:
    """weights × z; 0 where the weight is 0, even if z is infinite or NaN there."""
    return torch.where(weights != 0, weights * z, 0.0)


def opad(current: Tensor, previous: Tensor | None) -> Tensor:
    """The term that OPAD (Zhu et al., ICLR 2025) adds to the direction of this token, [V].

    current: The direction of this token, [V].
    previous: The direction of the previous token, [V]. None at the first token; the result then cancels `current`.
    """
    return -current if previous is None else previous


def adaptive(coefficients: Tensor, weights: Tensor, principled: Tensor, base: Tensor) -> Tensor:
    """The coefficients, [k], with every ratio limited to ADAPTIVE_SCALE × the Jensen-Shannon divergence (nats) of the
    principled and the base policy. The idea is AdaCAD's (Wang et al., NAACL 2025): the less the two policies differ,
    the less there is to amplify.

    coefficients, weights: [k]. principled, base: Logits, [V].
    """
    log_p, log_q = principled.log_softmax(dim=-1), base.log_softmax(dim=-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergence = sum(torch.where(log > -torch.inf, log.exp() * (log - log_m), 0).sum() for log in (log_p, log_q)) / 2
    return torch.minimum(coefficients, weights * ADAPTIVE_SCALE * divergence)


@dataclass(frozen=True, slots=True)
class Mixing:
    """How the rows of logits are mixed to S lines, one for each sequence, of up to k principled branches."""

    principled: Tensor  # [S, k] int64, row numbers; sequences with fewer branches repeat a row at weight 0
    weights: Tensor  # [S, k] float32, each line sums to 1
    coefficients: Tensor  # [S, k] float32
    base: Tensor  # [S] int64, row numbers; the first principled row where there is no base branch
    addition: Tensor | None = None  # [S, V] float32, added to the direction; None adds nothing

    def __getitem__(self, index: Tensor | slice) -> "Mixing":
        """The mixing of the selected sequences."""
        return Mixing(
            self.principled[index],
            self.weights[index],
            self.coefficients[index],
            self.base[index],
            None if self.addition is None else self.addition[index],
        )

    def to(self, device: torch.device) -> "Mixing":
        """A copy of the host's mixing on a device. Mixings on the host have no `addition`."""
        return Mixing(
            *(to_device(line, device) for line in (self.principled, self.weights, self.coefficients, self.base))
        )

    @classmethod
    def of(
        cls, sequences: Sequence[tuple[Sequence[float], Sequence[float], bool]], may_start_from_base: bool = True
    ) -> "Mixing":
        """The mixing, on the host, of sequences whose rows are consecutive: the principled branches of a sequence, then
        its base branch if it has one.

        sequences: (weights, coefficients, whether there is a base branch) of each sequence.
        may_start_from_base: Whether a sequence that `starts_from_base` is mixed as z_b + Σ (w_i + c_i)(z_i − z_b),
            which has the same value.
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
    """Whether all rows of each sequence are free of NaN and +∞, [S] bool. −∞ is valid: models mask tokens with it.

    logits: [rows, V] float32.
    """
    is_row_finite = logits.amax(dim=-1) < torch.inf  # amax returns NaN if a row has one, and NaN < ∞ is false
    return is_row_finite[mixing.principled].all(dim=1) & is_row_finite[mixing.base]


def principled_logits(logits: Tensor, mixing: Mixing) -> Tensor:
    """z_p = Σ w_i z_i (docs/design.md, section 2, general form), [S, V] float32; bit-equal to the single row if k = 1.

    logits: [rows, V] float32.
    """
    first, *others = mixing.principled.unbind(1)
    if not others:
        return logits[first]
    total = weighted(mixing.weights[:, :1], logits[first])
    for i, rows in enumerate(others, 1):
        total += weighted(mixing.weights[:, i, None], logits[rows])
    return total


def direction(logits: Tensor, mixing: Mixing, tokens: Tensor | None = None) -> Tensor:
    """Σ c_i (z_i − z_b), [S, K] float32, which is added to the edited z_p (docs/design.md, section 2, steps 2 and 3,
    where c_i = w_i r_i). Exactly 0 for a sequence without a base branch. Without `mixing.addition` also 0 where a
    model's own logit is −inf.

    logits: [rows, V] float32, not edited.
    tokens: [S, K] int64, the tokens to compute it for. None means all V tokens.
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
    """The greatest logit of each line, [S], and log Σ exp((y − greatest) / temperature), [S]: the logarithm of the
    total mass if the mass of the best token is 1.

    y: [S, V] float32. temperature: [S].
    """
    best = y.amax(dim=-1)
    return best, ((y - best[:, None]) / temperature[:, None]).exp_().sum(dim=-1).log_()


def plausible_set(y: Tensor, log_total: Tensor, top_p: Tensor, temperature: Tensor) -> Tensor:
    """The plausible set (docs/design.md, section 2, step 4), [S, K] bool: the nucleus of the edited principled policy.

    In descending order of probability, a token is in the set while the mass before it is below top_p. At least one
    token is in the set. Ties go to the lower token id. top_p = 1 keeps every token whose logit is not −inf.

    y: [S, K] float32, edited principled logits. Tokens too unlikely for the set may be missing (`plausible_floor`).
    log_total: [S], of the whole vocabulary: see `log_totals`.
    top_p, temperature: [S] float32.
    """
    ordered, order = torch.sort(y, dim=-1, descending=True, stable=True)
    mass = ((ordered - ordered[:, :1]) / temperature[:, None] - log_total[:, None]).exp()
    before = mass.cumsum(dim=-1) - mass
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(1, order, kept) & (y > -torch.inf)


def plausible_floor(best: Tensor, log_total: Tensor, vocab_size: int, top_p: Tensor, temperature: Tensor) -> Tensor:
    """A lower bound of the logits of the plausible set, [S]; −inf where top_p = 1.

    All tokens of probability < ε together have a mass < Vε. So with Vε = 1 − top_p the mass before each of them is
    above top_p, and none is in the set. The factor of two leaves room for rounding.

    best, log_total: [S], see `log_totals`. top_p, temperature: [S] float32.
    """
    return best + temperature * (log_total + ((1 - top_p) / (2 * vocab_size)).log())
