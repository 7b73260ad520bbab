"""From the logits of a step's rows to one token a sequence."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from linalign.alignment_core.cpu import vocabulary
from linalign.alignment_core.decoding import static_draw
from linalign.alignment_core.decoding.alignment import (
    Mixing,
    adaptive,
    difference,
    direction,
    is_finite,
    log_totals,
    opad,
    plausible_floor,
    plausible_set,
    principled_logits,
    weighted,
)
from linalign.alignment_core.decoding.edits import edit
from linalign.alignment_core.decoding.methods import METHODS, starts_from_base
from linalign.alignment_core.decoding.static_draw import NO_TOKEN, Filters, inverse_transform
from linalign.alignment_core.scheduling.sequence import Sequence
from linalign.alignment_core.transfer import to_device

MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What each sequence asked for, as tensors, all [S].

    aligned: bool, whether there is a base branch. nucleus_top_p, nucleus_temperature: float32, of the
    set that the principled logits alone decide: the plausible one, or, as it is the same thing, that
    of a plain sequence's top_p if nothing goes before it. temperature, top_p, min_p: float32, of what
    is done to the mixed logits; a temperature of 0 takes the best token. top_k: int64, 0 switches it
    off. uniform: float64 in [0, 1), the draw's own number.
    """

    aligned: Tensor
    nucleus_top_p: Tensor
    nucleus_temperature: Tensor
    temperature: Tensor
    top_k: Tensor
    min_p: Tensor
    top_p: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, sequences: Seq[Sequence], positions: Seq[int]) -> "Settings":
        """positions: how many tokens of each reply come before the one to draw; negative where the token is given.
        The tensors are on the host.
        """
        params = [sequence.params for sequence in sequences]
        aligned = [sequence.prompt.base is not None for sequence in sequences]
        nuclei = []
        for sequence, p, is_aligned in zip(sequences, params, aligned, strict=True):
            if is_aligned:
                top_p = METHODS[sequence.prompt.method].top_p if p.alignment_top_p is None else p.alignment_top_p
                nuclei.append((top_p, p.plausible_temperature, p.top_p))
            elif p.temperature > 0 and p.top_k == 0 and p.min_p == 0:
                nuclei.append((p.top_p, p.temperature, 1.0))
            else:
                nuclei.append((1.0, 1.0, p.top_p))
        nucleus_top_p, nucleus_temperature, of_mixed = torch.tensor(nuclei, dtype=torch.float32).unbind(1)
        counter = [(s.seed, s.choice, position) for s, position in zip(sequences, positions, strict=True)]
        return cls(
            aligned=torch.tensor(aligned),
            nucleus_top_p=nucleus_top_p,
            nucleus_temperature=nucleus_temperature.clamp(1e-30, 1e30),  # what float32 can divide by
            temperature=torch.tensor([float(p.temperature) for p in params]),
            top_k=torch.tensor([min(p.top_k, 1 << 62) for p in params]),
            min_p=torch.tensor([float(p.min_p) for p in params]),
            top_p=of_mixed,
            uniform=torch.tensor([uniform(*numbers) for numbers in counter], dtype=torch.float64),
        )

    def __getitem__(self, index: Tensor | slice) -> "Settings":
        return Settings(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device) -> "Settings":
        """From the host to a device."""
        return Settings(*(to_device(getattr(self, field.name), device) for field in fields(self)))


def sample(logits: Tensor, sequences: Seq[Sequence], positions: Seq[int]) -> Tensor:
    """Draw a token for every sequence; one that is there several times, at as many positions, gets several; [S] int64.
    NO_TOKEN where the logits are not finite.

    logits: [rows, V] float32; each sequence's branches in order (principled, then base), in the
    order of `sequences`. positions: see `Settings.of`.
    """
    mixing = mixing_of(logits, sequences, positions)
    settings = Settings.of(sequences, positions)
    y = principled_logits(logits, mixing)
    edit(y, sequences, positions)
    if y.is_cuda:
        return static_draw.choose(logits, y, mixing, settings.to(y.device), Filters.of(settings))
    tokens = torch.empty(len(y), dtype=torch.int64, device=y.device)
    decided = ~settings.aligned & (settings.temperature == 0)
    if decided.any():
        index = _lines(decided)
        best, first = y[index].max(dim=-1)
        tokens[index] = torch.where(best.isfinite(), first, NO_TOKEN)
    if not decided.all():
        index = _lines(~decided)
        tokens[index] = choose(logits, y[index], mixing[index], settings[index])
    return torch.where(is_finite(logits, mixing), tokens, NO_TOKEN)


def plan(sequences: Seq[Sequence], may_turn: bool = True) -> Mixing:
    """How the rows of these sequences are mixed, as far as no logit is needed to tell: see `Mixing.plan`."""
    prompts = [sequence.prompt for sequence in sequences]
    return Mixing.plan([(p.weights, p.coefficients, p.base is not None) for p in prompts], may_turn)


def mixing_of(logits: Tensor, sequences: Seq[Sequence], positions: Seq[int]) -> Mixing:
    """How the rows of logits, [rows, V], are mixed: see `sample`."""
    mixing, row = plan(sequences).to(logits.device), 0
    additions = torch.zeros(0)
    for line, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        rows, prompt = logits[row : row + len(sequence.branches)], sequence.prompt
        row += len(rows)
        if prompt.base is None or not prompt.follows_logits:
            continue
        weights, coefficients = to_device(torch.tensor([prompt.weights, prompt.coefficients]), logits.device)
        if prompt.method == "adaptive":
            mean = weighted(weights[:, None], rows[:-1]).sum(dim=0)
            limited = adaptive(coefficients, weights, mean, rows[-1])
            away = int(starts_from_base(prompt.coefficients))
            mixing.coefficients[line, away : away + len(weights)] = limited + away * weights
        else:
            now = sequence.directions[position] = coefficients @ difference(rows[:-1], rows[-1])
            if not len(additions):
                additions = torch.zeros(len(sequences), logits.shape[1], device=logits.device)
            additions[line] = opad(now, sequence.directions.get(position - 1))
    return replace(mixing, addition=additions) if len(additions) else mixing


def _lines(mask: Tensor) -> Tensor | slice:
    """The lines that are set, as an index; it copies nothing where all are."""
    return slice(None) if mask.all() else mask.nonzero().squeeze(1)


def choose(logits: Tensor, y: Tensor, mixing: Mixing, settings: Settings) -> Tensor:
    """The tokens of sequences that need more than the best logit of one row; [S] int64.

    logits: [rows, V] float32. y: [S, V] float32, the edited principled logits.
    """
    chosen = torch.empty(len(y), dtype=torch.int64, device=y.device)
    for index, tokens, z in candidates(logits, y, mixing, settings):
        place = draw(z, settings[index])
        drawn = tokens.gather(1, place[:, None]).squeeze(1)
        chosen[index] = torch.where(z.amax(dim=-1).isfinite(), drawn, NO_TOKEN)  # NaN is greater than every number
    return chosen


def candidates(
    logits: Tensor, y: Tensor, mixing: Mixing, settings: Settings
) -> Iterator[tuple[Tensor | slice, Tensor, Tensor]]:
    """The tokens that can be drawn and their mixed logits, for some of the lines at a time.

    logits, y: as for `choose`; settings: on the host. Yields an index of lines, and for those [N, K] int64 and
    float32, see `narrow`: on CUDA all tokens of all lines, as the host does not wait to see which of them matter.
    """
    if y.is_cuda:
        ids = torch.arange(y.shape[1], device=y.device).expand(y.shape)
        filters = Filters.of(settings)
        yield slice(None), ids, static_draw.mixed_logits(logits, y, mixing, settings.to(y.device), filters)
        return
    totals_of = vocabulary.log_totals if vocabulary.has_kernels(y) else log_totals
    best, totals = totals_of(y, settings.nucleus_temperature)
    bounds = floor(y, best, totals, settings)
    narrowed = bounds > -torch.inf
    for group in (narrowed, ~narrowed):  # so that few candidates stay few
        if group.any():
            index = _lines(group)
            tokens, of_tokens = narrow(y[index], bounds[index])
            yield index, tokens, mixed_logits(logits, tokens, of_tokens, totals[index], mixing[index], settings[index])


def mixed_logits(
    logits: Tensor, tokens: Tensor, y: Tensor, totals: Tensor, mixing: Mixing, settings: Settings
) -> Tensor:
    """z of DESIGN section 2.3 at `tokens`, −inf outside the nucleus; y itself inside it where not aligned.

    logits: [rows, V]; tokens, y and the result: [S, K]; totals: [S], see `log_totals`.
    """
    z = y + direction(logits, mixing, tokens) if settings.aligned.any() else y
    if (settings.nucleus_top_p < 1).any():
        kept = plausible_set(y, totals, settings.nucleus_top_p, settings.nucleus_temperature)
        z = z.masked_fill(~kept, -torch.inf)
    return z


def floor(y: Tensor, best: Tensor, totals: Tensor, settings: Settings) -> Tensor:
    """A logit below which no token can be drawn, so that nobody sorts the whole vocabulary; [S].

    y: [S, V] float32; best: [S], its greatest. −inf where every token is possible, or the logits are not finite.
    """
    bounds = plausible_floor(best, totals, y.shape[1], settings.nucleus_top_p, settings.nucleus_temperature)
    bounds = torch.where(bounds.isnan(), -torch.inf, bounds)
    if settings.aligned.all():
        return bounds
    of_min_p = best + settings.temperature * settings.min_p.log() - 1e-3  # room for rounding
    of_min_p = torch.where(of_min_p.isnan(), -torch.inf, of_min_p)
    bounds = torch.where(settings.aligned, bounds, torch.maximum(bounds, of_min_p))
    by_rank = (~settings.aligned & (settings.top_k > 0)).nonzero().squeeze(1)
    for index in by_rank.tolist():
        best = y[index].topk(min(int(settings.top_k[index]), y.shape[1])).values
        bounds[index] = torch.fmax(bounds[index], best[-1])
    return bounds


def narrow(y: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens at or above each line's bound, and their logits: [S, K] int64 and float32.

    In order of token id, filled up with token 0 at −inf. All tokens where no line has a bound.
    """
    if (bounds == -torch.inf).all():
        return torch.arange(y.shape[1], device=y.device).expand(y.shape), y
    if vocabulary.has_kernels(y):
        return vocabulary.narrow(y, bounds)
    line, token = (y >= bounds[:, None]).nonzero(as_tuple=True)
    counts = line.bincount(minlength=len(y))
    place = torch.arange(len(line), device=y.device) - (counts.cumsum(0) - counts)[line]
    tokens = torch.zeros(len(y), int(counts.max()), dtype=torch.int64, device=y.device)
    candidates = torch.full(tokens.shape, -torch.inf, device=y.device)
    tokens[line, place] = token
    candidates[line, place] = y[line, token]
    return tokens, candidates


def draw(z: Tensor, settings: Settings) -> Tensor:
    """One place a line from softmax(z / temperature) after top_k, then min_p, then top_p; [S] int64.

    z: [S, K] float32, −inf where a token is out already. Inverse transform over the probabilities in
    order of token id, so that a draw depends on its own line and number alone.
    """
    best, first = z.max(dim=-1, keepdim=True)
    greedy = settings.temperature == 0
    if greedy.all():
        return first.squeeze(1)
    temperature = torch.where(greedy, 1.0, settings.temperature)[:, None]
    mass = ((z - best) / temperature).exp()  # relative to the best token's
    if ((settings.top_k > 0) | (settings.top_p < 1)).any():
        mass = mass * _kept(mass, settings)
    else:
        mass = mass * (mass >= settings.min_p[:, None])
    return torch.where(greedy, first.squeeze(1), inverse_transform(mass, settings.uniform))


def _kept(mass: Tensor, settings: Settings) -> Tensor:
    """[S, K] bool: what top_k, then min_p, then top_p of what is left by then, let through."""
    ordered, order = torch.sort(mass, dim=-1, descending=True, stable=True)
    rank = torch.arange(mass.shape[1], device=mass.device)
    top_k, top_p = settings.top_k[:, None], settings.top_p[:, None]
    kept = ((rank < top_k) | (top_k == 0)) & (ordered >= settings.min_p[:, None])
    left = (ordered * kept).double()
    cumulative = left.cumsum(dim=-1)
    kept &= (cumulative - left < top_p * cumulative[:, -1:]) | (top_p >= 1)
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(1, order, kept)


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, choice, position) alone: the SplitMix64 finaliser
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
