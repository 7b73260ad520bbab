"""Mixed logits of the few tokens that matter, on a CPU: nothing sorts or mixes a whole vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from linalign.alignment_core.cpu import vocabulary
from linalign.alignment_core.decoding.alignment import direction, log_totals, plausible_floor, plausible_set
from linalign.alignment_core.decoding.draw_settings import DrawSettings


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that N lines can draw, at most K for each.

    index: the N lines. token_ids: [N, K] int64. z: [N, K] float32, their mixed logits (docs/design.md, section 2,
    steps 3 and 4); −inf for a token that can't be drawn.
    """

    index: Tensor | slice
    token_ids: Tensor
    z: Tensor

    def lines(self, num_lines: int) -> list[int]:
        """The numbers of the N lines, out of `num_lines`."""
        lines: list[int] = torch.arange(num_lines)[self.index].tolist()
        return lines


def candidates(logits: Tensor, y: Tensor, settings: DrawSettings) -> Iterator[Candidates]:
    """The candidates of all S lines, in groups of lines.

    logits: [rows, V] float32. y: [S, V] float32, the edited principled logits.
    """
    totals_of = vocabulary.log_totals if vocabulary.has_kernels(y) else log_totals
    best, totals = totals_of(y, settings.nucleus_temperature)
    bounds = floor(y, best, totals, settings)
    narrowed = bounds > -torch.inf
    for group in (narrowed, ~narrowed):  # so that few candidates stay few
        if group.any():
            index = indices(group)
            tokens, of_tokens = narrow(y[index], bounds[index])
            yield Candidates(index, tokens, mixed_logits(logits, tokens, of_tokens, totals[index], settings[index]))


def indices(mask: Tensor) -> Tensor | slice:
    """The lines that are set in the mask, as an index that copies nothing where all lines are set."""
    return slice(None) if mask.all() else mask.nonzero().squeeze(1)


def mixed_logits(logits: Tensor, tokens: Tensor, y: Tensor, totals: Tensor, settings: DrawSettings) -> Tensor:
    """z at `tokens`, −inf outside the nucleus; equal to y inside it for a plain line.

    logits: [rows, V]; tokens, y and the result: [S, K]; totals: [S], see `log_totals`.
    """
    z = y + direction(logits, settings.mixing, tokens) if settings.aligned.any() else y
    if (settings.nucleus_top_p < 1).any():
        kept = plausible_set(y, totals, settings.nucleus_top_p, settings.nucleus_temperature)
        z = z.masked_fill(~kept, -torch.inf)
    return z


def floor(y: Tensor, best: Tensor, totals: Tensor, settings: DrawSettings) -> Tensor:
    """A logit below which a line can draw no token; [S].

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

    In order of token id, padded with token 0 at −inf. All tokens where no line has a bound.
    """
    if (bounds == -torch.inf).all():
        return torch.arange(y.shape[1], device=y.device).expand(y.shape), y
    if vocabulary.has_kernels(y):
        return vocabulary.narrow(y, bounds)
    line, token = (y >= bounds[:, None]).nonzero(as_tuple=True)
    counts = line.bincount(minlength=len(y))
    place = torch.arange(len(line), device=y.device) - (counts.cumsum(0) - counts)[line]
    tokens = torch.zeros(len(y), int(counts.max()), dtype=torch.int64, device=y.device)
    of_tokens = torch.full(tokens.shape, -torch.inf, device=y.device)
    tokens[line, place] = token
    of_tokens[line, place] = y[line, token]
    return tokens, of_tokens
