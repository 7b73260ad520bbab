"""Alignment methods: functions from weights and ratios to coefficients of the branches (docs/methods.md)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Method = Literal["linear", "context_steering", "cfg", "opad", "amulet", "adaptive"]
Coefficients = tuple[float, ...]  # c_i in z = Σ w_i z_i + Σ c_i (z_i − z_b), one per principled branch

# Amulet's published constants. Its α is the ratio.
AMULET_LAMBDA, AMULET_ETA, AMULET_STEPS = 2.0, 10.0, 60


def linear(weights: Sequence[float], ratios: Sequence[float]) -> Coefficients:
    """Linear Alignment, and classifier-free guidance of scale 1 + r (Sanchez et al., arXiv 2306.17806)."""
    return tuple(weight * ratio for weight, ratio in zip(weights, ratios, strict=True))


def context_steering(weights: Sequence[float], ratios: Sequence[float]) -> Coefficients:
    """CoS (He et al., ICLR 2025): one context is extrapolated by r; each of several is added to the base r_i times."""
    if len(ratios) == 1:
        return tuple(ratios)
    return tuple(ratio - weight for weight, ratio in zip(weights, ratios, strict=True))


def amulet(weights: Sequence[float], ratios: Sequence[float]) -> Coefficients:
    """Amulet (Zhang et al., ICLR 2025) with α = r: the paper's loop over the policy of each token, in closed form.

    Each step t of the loop is linear in the log-probabilities: L_c + a_t (L_c − L_u), with a_0 = 0 and
    a_t (λ + 1/ηt) = α (1 + mean of a_0 … a_{t−1}) + a_{t−1}/ηt. So a_t does not depend on the token.
    """

    def last(alpha: float) -> float:
        a = total = 0.0
        for t in range(1, AMULET_STEPS + 1):
            total += a
            inertia = 1 / (AMULET_ETA * t)
            a = (alpha * (1 + total / t) + inertia * a) / (AMULET_LAMBDA + inertia)
        return a

    return linear(weights, [last(ratio) for ratio in ratios])


@dataclass(frozen=True, slots=True)
class MethodRule:
    """An alignment method."""

    coefficients: Callable[[Sequence[float], Sequence[float]], Coefficients]  # from weights and ratios
    top_p: float  # mass of the plausible set if a request sets none; 1 for methods published without such a set


METHODS: dict[Method, MethodRule] = {
    "linear": MethodRule(linear, 0.99),  # docs/decisions/0013
    "context_steering": MethodRule(context_steering, 1.0),
    "cfg": MethodRule(linear, 1.0),
    "opad": MethodRule(linear, 1.0),  # `alignment.opad` adds a term
    "amulet": MethodRule(amulet, 1.0),
    "adaptive": MethodRule(linear, 0.99),  # `alignment.adaptive` lowers them
}


def starts_from_base(coefficients: Sequence[float]) -> bool:
    """Whether the reply moves away from its principles: the guidance scale, 1 + Σ c_i, is negative.

    The plausible set is then the base policy's.
    """
    return 1 + sum(coefficients) < 0
