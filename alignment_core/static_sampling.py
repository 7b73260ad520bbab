"""The draw of `sampling`, in shapes that depend on [S, V] alone and without a look at any value on the host:
what a CUDA graph can hold and torch.compile can fuse.

Where `sampling` sorts the few tokens that matter, this looks for the threshold that sorting would
find, bit by bit: a float's bits, read as an integer, are in the order of the floats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignment_core.alignment import Mixing, direction, principled_logits
from alignment_core.sampling import Settings, inverse_transform

DIGIT = 4  # bits that one pass over the vocabulary finds
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Filters:
    """What some sequence of a step asks for; each costs passes over the vocabulary for all of them."""

    nucleus: bool
    top_k: bool
    top_p: bool
    random: bool

    @classmethod
    def of(cls, settings: Settings) -> "Filters":
        """settings: on the host."""
        return cls(
            nucleus=bool((settings.nucleus_top_p < 1).any()),
            top_k=bool((settings.top_k > 0).any()),
            top_p=bool((settings.top_p < 1).any()),
            random=bool((settings.temperature > 0).any()),
        )


def draw(logits: Tensor, mixing: Mixing, settings: Settings, filters: Filters) -> Tensor:
    """One token a sequence, [S] int64: DESIGN sections 2.1 to 2.5.

    logits: [rows, V] float32.
    """
    y = principled_logits(logits, mixing)
    z = y + direction(logits, mixing)
    if filters.nucleus:
        best = y.amax(dim=-1, keepdim=True)
        mass = ((y - best) / settings.nucleus_temperature[:, None]).exp()
        z = z.masked_fill(~leading(y, mass, _share(settings.nucleus_top_p, mass)), -torch.inf)
    if filters.top_k:
        limit = torch.where(settings.top_k > 0, settings.top_k.float(), torch.inf)
        z = z.masked_fill(~leading(z, torch.ones_like(z), limit), -torch.inf)
    best, first = z.max(dim=-1, keepdim=True)
    if not filters.random:
        return first.squeeze(1)
    greedy = settings.temperature == 0
    mass = ((z - best) / torch.where(greedy, 1.0, settings.temperature)[:, None]).exp()
    mass = mass * (mass >= settings.min_p[:, None])
    if filters.top_p:
        mass = mass * leading(z, mass, _share(settings.top_p, mass))
    return torch.where(greedy, first.squeeze(1), inverse_transform(mass, settings.uniform))


def leading(x: Tensor, weight: Tensor, limit: Tensor) -> Tensor:
    """[S, V] bool: in falling order of x, ties by token id, those before which there is less than `limit`.

    x: [S, V] float32; weight: [S, V] float32, ≥ 0, the same where x is the same. limit: [S] > 0.
    """
    bits = (x + 0.0).view(torch.int32)  # −0.0 is 0.0
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    threshold = _threshold(keys, weight, limit)[:, None]
    above = torch.where(keys > threshold, weight, 0).sum(dim=-1, keepdim=True)
    tied = keys == threshold
    each = torch.where(tied, weight, 0).amax(dim=-1, keepdim=True)
    earlier = tied.cumsum(dim=-1, dtype=torch.int32) - 1
    return (keys > threshold) | (tied & (above + earlier * each < limit[:, None]))


def _threshold(keys: Tensor, weight: Tensor, limit: Tensor) -> Tensor:
    """The least key of each line above which the weight is below its limit; [S] int32."""
    low = torch.full((len(keys),), -(1 << 31), dtype=torch.int64, device=keys.device)
    for shift in range(32 - DIGIT, -1, -DIGIT):
        ends = [(low + (part << shift) - 1).int()[:, None] for part in range(1, 1 << DIGIT)]
        above = torch.stack([torch.where(keys > end, weight, 0).sum(dim=-1) for end in ends])
        low = low + ((above >= limit).sum(dim=0) << shift)
    return low.int()


def _share(top_p: Tensor, mass: Tensor) -> Tensor:
    """The limit that is top_p of the whole mass; none where top_p is 1."""
    return torch.where(top_p < 1, (top_p * mass.sum(dim=-1)).clamp(min=TINY), torch.inf)
