"""The settings of a step's draws as tensors: how rows are mixed to logits, and the sampling parameters."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from linalign.alignment_core.decoding.alignment import Mixing
from linalign.alignment_core.methods import METHODS
from linalign.alignment_core.request import Prompt
from linalign.alignment_core.scheduling.sequence import NextToken, Sequence
from linalign.alignment_core.transfer import to_device

MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """Settings of S draws; all tensors are [S]. The order of the fields is that of `static_sampler._pack`.

    The nucleus is the set that only the edited principled logits decide. For an aligned line it is the plausible set.
    For a plain line it is the nucleus of the request's top_p if no other filter comes before it; `top_p` is then 1.
    """

    mixing: Mixing  # how the rows of logits are mixed to each line
    aligned: Tensor  # bool, whether there is a base branch
    nucleus_top_p: Tensor  # float32, mass of the nucleus
    nucleus_temperature: Tensor  # float32
    temperature: Tensor  # float32, of the mixed logits; 0 takes the best token
    top_k: Tensor  # int64, of the mixed logits; 0 switches it off
    min_p: Tensor  # float32, of the mixed logits
    top_p: Tensor  # float32, of the mixed logits
    uniform: Tensor  # float64 in [0, 1), the random number of the draw

    @classmethod
    def of(cls, next_tokens: Seq[NextToken]) -> "DrawSettings":
        """Settings on the host, for logits whose rows are the branches of each next token in turn."""
        params = [sequence.params for sequence, _ in next_tokens]
        nuclei = [_nucleus(sequence) for sequence, _ in next_tokens]
        nucleus_top_p, nucleus_temperature, top_p = torch.tensor(nuclei, dtype=torch.float32).unbind(1)
        counter = [(s.seed, s.choice, position) for s, position in next_tokens]
        return cls(
            mixing=mixing_of([sequence.prompt for sequence, _ in next_tokens]),
            aligned=torch.tensor([sequence.prompt.base is not None for sequence, _ in next_tokens]),
            nucleus_top_p=nucleus_top_p,
            nucleus_temperature=nucleus_temperature.clamp(1e-30, 1e30),  # float32 can divide by these
            temperature=torch.tensor([float(p.temperature) for p in params]),
            top_k=torch.tensor([min(p.top_k, 1 << 62) for p in params]),
            min_p=torch.tensor([float(p.min_p) for p in params]),
            top_p=top_p,
            uniform=torch.tensor([uniform(*numbers) for numbers in counter], dtype=torch.float64),
        )

    def __getitem__(self, index: Tensor | slice) -> "DrawSettings":
        return DrawSettings(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device) -> "DrawSettings":
        """A copy of the host's settings on a device."""
        tensors = [to_device(getattr(self, field.name), device) for field in fields(self)[1:]]
        return DrawSettings(self.mixing.to(device), *tensors)


def mixing_of(prompts: Seq[Prompt], may_start_from_base: bool = True) -> Mixing:
    """The mixing of these prompts' branches, on the host, without the part that depends on logits. See `Mixing.of`."""
    return Mixing.of([(p.weights, p.coefficients, p.base is not None) for p in prompts], may_start_from_base)


def _nucleus(sequence: Sequence) -> tuple[float, float, float]:
    """nucleus_top_p, nucleus_temperature, and the top_p of the mixed logits."""
    p, prompt = sequence.params, sequence.prompt
    if prompt.base is not None:
        top_p = METHODS[prompt.method].top_p if p.alignment_top_p is None else p.alignment_top_p
        return top_p, p.plausible_temperature, p.top_p
    if p.temperature > 0 and p.top_k == 0 and p.min_p == 0:
        return p.top_p, p.temperature, 1.0
    return 1.0, 1.0, p.top_p


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends only on (seed, choice, position): the SplitMix64 finaliser
    (Steele, Lea and Flood, OOPSLA 2014) chained over the three.
    """
    bits = 0
    for number in (seed, choice, position):
        bits = _splitmix64(bits ^ number)
    return (bits >> 11) * 2.0**-53


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)
