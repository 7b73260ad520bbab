"""The draw of draw.py in fixed shapes: they depend only on [S, V], and the host reads no value of a tensor.

So a CUDA graph can hold it, torch.compile can fuse it, and the host need not wait for the device. Where draw.py
sorts a few candidates, this finds the threshold that sorting would find, bit by bit: the bits of floats,
read as integers, have the order of the floats.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from linalign.alignment_core.decoding.alignment import direction, is_finite, principled_logits

if TYPE_CHECKING:
    from linalign.alignment_core.decoding.draw_settings import DrawSettings

BLOCK = 128
DIGIT = 4  # bits that one pass over the vocabulary finds
WeightsAbove = Callable[[Tensor, Tensor, Tensor, int], Tensor]
NO_TOKEN = -1  # instead of a token id, where the logits are not finite
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters that some line of a step needs. Each costs passes over the vocabulary for all lines."""

    nucleus: bool = False
    top_k: bool = False
    top_p: bool = False
    random: bool = False

    @classmethod
    def of(cls, settings: "DrawSettings") -> "Filters":
        """settings: on the host."""
        return cls(
            nucleus=bool((settings.nucleus_top_p < 1).any()),
            top_k=bool((settings.top_k > 0).any()),
            top_p=bool((settings.top_p < 1).any()),
            random=bool((settings.temperature > 0).any()),
        )

    @property
    def prepared(self) -> "Filters":
        """The smallest of PREPARED that includes these filters. Few sets are compiled and captured, at the start."""
        return next(more for more in PREPARED if all(a >= b for a, b in zip(astuple(more), astuple(self), strict=True)))


PREPARED = (
    Filters(),
    Filters(random=True),
    Filters(nucleus=True),
    Filters(nucleus=True, random=True),
    Filters(nucleus=True, top_k=True, top_p=True, random=True),
)


def weights_above(keys: Tensor, weight: Tensor, low: Tensor, width: int) -> Tensor:
    """The weight above the last key of each part but the last, parts being `width` keys from `low` on; [parts, S]."""
    ends = [(low + part * width - 1).int()[:, None] for part in range(1, 1 << DIGIT)]
    return torch.stack([torch.where(keys > end, weight, 0).sum(dim=-1) for end in ends])


def draw_from_logits(
    logits: Tensor, settings: "DrawSettings", filters: Filters, weights_above: WeightsAbove = weights_above
) -> Tensor:
    """Draw one token a line from a step's logits, without edits: docs/design.md, section 2, steps 1 to 5.

    logits: [rows, V] float32. filters: those of `settings`, or more. weights_above: Like the function `weights_above`.
    Returns [S] int64, NO_TOKEN where the logits of a line are not finite.
    """
    y = principled_logits(logits, settings.mixing)
    z = mixed_logits(logits, y, settings, filters, weights_above)
    return draw_from_mixed(z, is_finite(logits, settings.mixing), settings, filters, weights_above)


def mixed_logits(
    logits: Tensor,
    y: Tensor,
    settings: "DrawSettings",
    filters: Filters,
    weights_above: WeightsAbove = weights_above,
) -> Tensor:
    """z of steps 3 and 4, [S, V] float32, −inf outside the nucleus. y: [S, V], the edited principled logits."""
    z = y + direction(logits, settings.mixing)
    if filters.nucleus:
        best = y.amax(dim=-1, keepdim=True)
        mass = ((y - best) / settings.nucleus_temperature[:, None]).exp()
        kept = leading(y, mass, _share(settings.nucleus_top_p, mass), weights_above)
        z = z.masked_fill(~kept, -torch.inf)
    return z


def draw_from_mixed(
    z: Tensor,
    is_finite: Tensor,
    settings: "DrawSettings",
    filters: Filters,
    weights_above: WeightsAbove = weights_above,
) -> Tensor:
    """Step 5: one token a line, [S] int64. z: [S, V]. is_finite: [S] bool, false for lines that get NO_TOKEN."""
    if filters.top_k:
        limit = torch.where(settings.top_k > 0, settings.top_k.float(), torch.inf)
        kept = leading(z, torch.ones_like(z), limit, weights_above)
        z = z.masked_fill(~kept, -torch.inf)
    best, first = z.max(dim=-1, keepdim=True)
    is_possible = best.squeeze(1).isfinite() & is_finite
    if not filters.random:
        return torch.where(is_possible, first.squeeze(1), NO_TOKEN)
    greedy = settings.temperature == 0
    mass = ((z - best) / torch.where(greedy, 1.0, settings.temperature)[:, None]).exp()
    mass = mass * (mass >= settings.min_p[:, None])
    if filters.top_p:
        kept = leading(z, mass, _share(settings.top_p, mass), weights_above)
        mass = mass * kept
    drawn = torch.where(greedy, first.squeeze(1), inverse_transform(mass, settings.uniform))
    return torch.where(is_possible, drawn, NO_TOKEN)


def leading(x: Tensor, weight: Tensor, limit: Tensor, weights_above: WeightsAbove) -> Tensor:
    """The tokens that have less than `limit` weight before them, in falling order of x, ties by token id; [S, V] bool.

    x: [S, V] float32; weight: [S, V] float32, ≥ 0, the same where x is the same. limit: [S] > 0.
    """
    bits = (x + 0.0).view(torch.int32)  # −0.0 is 0.0
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    threshold: Tensor = _threshold(keys, weight, limit, weights_above)[:, None]
    above = torch.where(keys > threshold, weight, 0).sum(dim=-1, keepdim=True)
    tied = keys == threshold
    each = torch.where(tied, weight, 0).amax(dim=-1, keepdim=True)
    earlier: Tensor = _num_earlier(tied)
    return (keys > threshold) | (tied & (above + earlier * each < limit[:, None]))


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]  # unrolled it takes minutes
def _threshold(keys: Tensor, weight: Tensor, limit: Tensor, weights_above: WeightsAbove) -> Tensor:
    """The least key of each line above which the weight is below its limit; [S] int32."""
    low = torch.full((len(keys),), -(1 << 31), dtype=torch.int64, device=keys.device)
    for shift in range(32 - DIGIT, -1, -DIGIT):
        above = weights_above(keys, weight, low, 1 << shift)
        low = low + ((above >= limit).sum(dim=0) << shift)
    return low.int()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # Inductor of torch 2.11 fails on scans of dynamic length
def _num_earlier(tied: Tensor) -> Tensor:
    """How many of each line are set before each place, [S, V] int32; −1 and up."""
    return tied.cumsum(dim=-1, dtype=torch.int32) - 1


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it scans, too
def inverse_transform(mass: Tensor, uniform: Tensor) -> Tensor:
    """The first place where the running sum of mass, [S, K], passes uniform × total; [S] int64."""
    blocks = pad(mass, (0, -mass.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))  # type: ignore[no-untyped-call]
    sums = blocks.sum(dim=-1).double().cumsum(dim=-1)
    target = _below(uniform[:, None] * sums[:, -1:], sums[:, -1:])
    block = torch.searchsorted(sums, target, right=True).clamp(max=blocks.shape[1] - 1)  # only NaN is beyond
    target = target - torch.where(block == 0, 0.0, sums.gather(1, (block - 1).clamp(min=0)))
    within = blocks[torch.arange(len(mass), device=mass.device), block.squeeze(1)].double().cumsum(dim=-1)
    place = torch.searchsorted(within, _below(target, within[:, -1:]), right=True)
    return (block * BLOCK + place).squeeze(1).clamp(max=mass.shape[1] - 1)


def _below(x: Tensor, limit: Tensor) -> Tensor:
    return torch.minimum(x, limit.nextafter(torch.zeros_like(limit)))


def _share(top_p: Tensor, mass: Tensor) -> Tensor:
    """The limit that is top_p of the whole mass; none where top_p is 1."""
    return torch.where(top_p < 1, (top_p * mass.sum(dim=-1)).clamp(min=TINY), torch.inf)
