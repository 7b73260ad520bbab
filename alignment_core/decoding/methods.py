"""Methods as coefficients of the branches, from their weights and ratios: docs/methods.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Method = Literal["linear", "context_steering", "cfg", "opad", "amulet", "adaptive"]
Coefficients = tuple[float, ...]  # c_i in z = Σ w_i z_i + Σ c_i (z_i − z_b), one for each principled branch

# Amulet's published constants beside α, which is the ratio.
AMULET_LAMBDA, AMULET_ETA, AMULET_STEPS = 2.0, 10.0, 60


def linear(weights: Sequence[float], ratios: Sequence[float]) -> Coefficients:
    """Linear Alignment, and classifier-free guidance of scale 1 + r (Sanchez et al., arXiv 2306.17806)."""
    return tuple(weight * ratio for weight, ratio in zip(weights, ratios, strict=True))


def context_steering(weights: Sequence[float], ratios: Sequence[float]) -> Coefficients:
    """CoS (He et al., ICLR 2025): one context is extrapolated by r; of several, each is added r_i times to the base."""
    if len(ratios) == 1:
        return tuple(ratios)
    return tuple(ratio - weight for weight, ratio in zip(weights, ratios, strict=True))


def amulet(weights: Sequence[float], ratios: Sequence[float]) -> Coefficients:
    """Amulet (Zhang et al., ICLR 2025) with α = r: their loop over the policy of every token in closed form.

    Each of its steps is linear in the log-probabilities, so it is L_c + a_t (L_c − L_u) with
    a_t (λ + 1/ηt) = α (1 + mean of a_0 … a_{t−1}) + a_{t−1}/ηt and a_0 = 0: a number that no token changes.
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
    """A method: its coefficients, from weights and ratios, and the plausible set's mass where a request names none
    (1: none, as published).
    """

    coefficients: Callable[[Sequence[float], Sequence[float]], Coefficients]
    top_p: float


METHODS: dict[Method, MethodRule] = {
    "linear": MethodRule(linear, 0.99),  # decision 0013
    "context_steering": MethodRule(context_steering, 1.0),
    "cfg": MethodRule(linear, 1.0),
    "opad": MethodRule(linear, 1.0),  # and what `opad` adds
    "amulet": MethodRule(amulet, 1.0),
    "adaptive": MethodRule(linear, 0.99),  # of which `adaptive` takes away
}


def starts_from_base(coefficients: Sequence[float]) -> bool:
    """Whether the reply moves away from its principles: their guidance scale, 1 + Σ c_i, is negative.

    The plausible set is then the base policy's.
    """
    return 1 + sum(coefficients) < 0
