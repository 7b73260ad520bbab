"""From the logits of a step's rows to one token a sequence."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment_core.alignment import Mixing, direction, plausible_set, principled_logits
from alignment_core.sequence import Sequence


def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Draw the next token of every sequence.

    logits: [rows, V] float32; each sequence's branches in order (principled, then base), in the
    order of `sequences`.
    """
    z = mixed_logits(logits, sequences)
    tokens = z.argmax(dim=-1)
    drawn = [index for index, sequence in enumerate(sequences) if sequence.params.temperature > 0]
    if drawn:
        filters = Filters.of([sequences[index] for index in drawn], z.device)
        index = torch.tensor(drawn, device=z.device)
        tokens[index] = draw(z[index], filters)
    chosen: list[int] = tokens.tolist()
    return chosen


def mixed_logits(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """z of DESIGN section 2.3, −inf outside the plausible set; [S, V] float32.

    A sequence without a base branch gets its z_p, untouched.
    """
    device = logits.device
    prompts = [sequence.prompt for sequence in sequences]
    mixing = Mixing.plan([(p.weights, p.ratios, p.base is not None) for p in prompts], device)
    z = principled_logits(logits, mixing)
    aligned = [index for index, prompt in enumerate(prompts) if prompt.base is not None]
    if aligned:
        params = [sequences[index].params for index in aligned]
        index = torch.tensor(aligned, device=device)
        top_p = torch.tensor([p.alignment_top_p for p in params], device=device)
        temperature = torch.tensor([p.plausible_temperature for p in params], device=device)
        plausible = plausible_set(z[index], top_p, temperature)
        z = z + direction(logits, mixing)
        z[index] = z[index].masked_fill(~plausible, -torch.inf)
    return z


@dataclass(frozen=True, slots=True)
class Filters:
    """What is left of each sequence's distribution before the draw, and the draw's own number. All [S].

    temperature, top_p, min_p: float32, temperature > 0. top_k: int64, 0 switches it off.
    uniform: float64 in [0, 1).
    """

    temperature: Tensor
    top_k: Tensor
    min_p: Tensor
    top_p: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, sequences: Seq[Sequence], device: torch.device) -> "Filters":
        params = [sequence.params for sequence in sequences]
        seed = torch.tensor([sequence.seed for sequence in sequences], device=device)
        choice = torch.tensor([sequence.choice for sequence in sequences], device=device)
        position = torch.tensor([len(sequence.output_ids) for sequence in sequences], device=device)
        return cls(
            temperature=torch.tensor([p.temperature for p in params], device=device),
            top_k=torch.tensor([p.top_k for p in params], device=device),
            min_p=torch.tensor([p.min_p for p in params], device=device),
            top_p=torch.tensor([p.top_p for p in params], device=device),
            uniform=uniform(seed, choice, position),
        )


def draw(z: Tensor, filters: Filters) -> Tensor:
    """One token a sequence from softmax(z / temperature) after top_k, then min_p, then top_p.

    z: [S, V] float32, −inf where a token is out already. Returns [S] int64. Inverse transform over
    the probabilities in falling order, so a draw depends on its own line and number alone.
    """
    ordered, order = torch.sort(z, dim=-1, descending=True, stable=True)
    scaled = (ordered - ordered[:, :1]) / filters.temperature[:, None]
    rank = torch.arange(z.shape[1], device=z.device)
    kept = (rank < filters.top_k[:, None]) | (filters.top_k[:, None] == 0)
    mass = scaled.exp() * kept  # relative to the best token's
    mass = mass * (mass >= filters.min_p[:, None])
    before = mass.double().cumsum(dim=-1) - mass
    total = mass.double().sum(dim=-1, keepdim=True)
    mass = mass * ((before < filters.top_p[:, None] * total) | (filters.top_p[:, None] >= 1))

    cumulative = mass.double().cumsum(dim=-1)
    target = filters.uniform[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    last = (mass > 0).sum(dim=-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(place, last)).squeeze(1)


def uniform(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) that depends on (seed, choice, position) alone. All [S] int64; returns [S] float64.

    Counter-based: the SplitMix64 finaliser (Steele, Lea and Flood, OOPSLA 2014) chained over the
    three, in wrapping 64-bit arithmetic, so it runs on any device without a generator's state.
    """
    bits = _splitmix64(_splitmix64(_splitmix64(seed) ^ choice) ^ position)
    return _shift_right(bits, 11).double() * 2.0**-53


def _splitmix64(x: Tensor) -> Tensor:
    x = x - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
