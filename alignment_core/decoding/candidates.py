"""Mixed logits of the few tokens that can be drawn, on a CPU, so that no code sorts or mixes a whole vocabulary."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from linalign.alignment_core.cpu import vocabulary
from linalign.alignment_core.decoding.alignment import direction, log_totals, plausible_floor, plausible_set
from linalign.alignment_core.decoding.draw_settings import DrawSettings


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that N lines can draw, at most K for each."""

    index: Tensor | slice  # the N lines
    token_ids: Tensor  # [N, K] int64
    z: Tensor  # [N, K] float32, mixed logits (docs/design.md, section 2, steps 3 and 4); −inf is never drawn

    def lines(self, num_lines: int) -> list[int]:
        """The line numbers that `index` selects out of `num_lines` lines."""
        lines: list[int] = torch.arange(num_lines)[self.index].tolist()
        return lines


def candidates(logits: Tensor, y: Tensor, settings: DrawSettings) -> Iterator[Candidates]:
    """The candidates of all S lines, in groups of lines.

    logits: [rows, V] float32. y: [S, V] float32, the edited principled logits.
    """
    compute_totals = vocabulary.log_totals if vocabulary.has_kernels(y) else log_totals
    best, totals = compute_totals(y, settings.nucleus_temperature)
    bounds = floor(y, best, totals, settings)
    is_bounded = bounds > -torch.inf
    for group in (is_bounded, ~is_bounded):  # lines without a bound would pad all others to the whole vocabulary
        if group.any():
            index = indices(group)
            tokens, token_logits = narrow(y[index], bounds[index])
            yield Candidates(index, tokens, mixed_logits(logits, tokens, token_logits, totals[index], settings[index]))


def indices(mask: Tensor) -> Tensor | slice:
    """An index of the lines that are set in the mask: a slice, which copies nothing, if all lines are set."""
    return slice(None) if mask.all() else mask.nonzero().squeeze(1)


def mixed_logits(logits: Tensor, tokens: Tensor, y: Tensor, totals: Tensor, settings: DrawSettings) -> Tensor:
    """z at `tokens`, [S, K] float32; −inf outside the nucleus. For a plain line z = y inside the nucleus.

    logits: [rows, V] float32. tokens: [S, K] int64. y: [S, K] float32, the edited principled logits of the tokens.
    totals: [S], see `log_totals`.
    """
    z = y + direction(logits, settings.mixing, tokens) if settings.aligned.any() else y
    if (settings.nucleus_top_p < 1).any():
        kept = plausible_set(y, totals, settings.nucleus_top_p, settings.nucleus_temperature)
        z = z.masked_fill(~kept, -torch.inf)
    return z


def floor(y: Tensor, best: Tensor, totals: Tensor, settings: DrawSettings) -> Tensor:
    """A lower bound of the edited logits that each line can draw, [S] float32; −inf where there is no bound or the
    logits are not finite.

    y: [S, V] float32, the edited principled logits. best, totals: [S], see `log_totals`.
    """
    bounds = plausible_floor(best, totals, y.shape[1], settings.nucleus_top_p, settings.nucleus_temperature)
    bounds = torch.where(bounds.isnan(), -torch.inf, bounds)
    if settings.aligned.all():
        return bounds
    min_p_bounds = best + settings.temperature * settings.min_p.log() - 1e-3  # room for rounding
    min_p_bounds = torch.where(min_p_bounds.isnan(), -torch.inf, min_p_bounds)
    bounds = torch.where(settings.aligned, bounds, torch.maximum(bounds, min_p_bounds))
    with_top_k = (~settings.aligned & (settings.top_k > 0)).nonzero().squeeze(1)
    for index in with_top_k.tolist():
        top = y[index].topk(min(int(settings.top_k[index]), y.shape[1])).values
        bounds[index] = torch.fmax(bounds[index], top[-1])
    return bounds


def narrow(y: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens whose logits are at or above each line's bound, [S, K] int64, and these logits, [S, K] float32.

    In order of token id, padded with token 0 at −inf. If no line has a bound: all tokens, without a copy of `y`.

    y: [S, V] float32. bounds: [S] float32, −inf for no bound.
    """
    if (bounds == -torch.inf).all():
        return torch.arange(y.shape[1], device=y.device).expand(y.shape), y
    if vocabulary.has_kernels(y):
        return vocabulary.narrow(y, bounds)
    line, token = (y >= bounds[:, None]).nonzero(as_tuple=True)
    counts = line.bincount(minlength=len(y))
    place = torch.arange(len(line), device=y.device) - (counts.cumsum(0) - counts)[line]
    tokens = torch.zeros(len(y), int(counts.max()), dtype=torch.int64, device=y.device)
    token_logits = torch.full(tokens.shape, -torch.inf, device=y.device)
    tokens[line, place] = token
    token_logits[line, place] = y[line, token]
    return tokens, token_logits
