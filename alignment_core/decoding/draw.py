"""Draws one token for each line from a step's policy. static_draw.py has the same filters in fixed shapes."""

from collections.abc import Iterable

import torch
from torch import Tensor

from linalign.alignment_core.decoding import static_draw
from linalign.alignment_core.decoding.candidates import Candidates, indices
from linalign.alignment_core.decoding.draw_settings import DrawSettings
from linalign.alignment_core.decoding.policy import Policy
from linalign.alignment_core.decoding.static_draw import NO_TOKEN, inverse_transform


def draw(policy: Policy) -> Tensor:
    """Draw a token for every line, [S] int64; NO_TOKEN where the logits of a line are not finite."""
    if policy.edited.is_cuda:
        (group,) = policy.candidates
        return static_draw.draw_from_mixed(group.z, policy.is_finite, policy.settings, policy.filters)
    tokens = draw_from_candidates(policy.candidates, policy.settings)
    if policy.is_greedy.any():
        index = indices(policy.is_greedy)
        best, first = policy.edited[index].max(dim=-1)
        tokens[index] = torch.where(best.isfinite(), first, NO_TOKEN)
    return torch.where(policy.is_finite, tokens, NO_TOKEN)


def draw_from_candidates(candidates: Iterable[Candidates], settings: DrawSettings) -> Tensor:
    """Draw a token for every line that has candidates, [S] int64. NO_TOKEN for lines without candidates, and for lines
    whose best candidate is −inf, +∞ or NaN.
    """
    tokens = torch.full((len(settings.temperature),), NO_TOKEN)
    for group in candidates:
        place = draw_places(group.z, settings[group.index])
        drawn = group.token_ids.gather(1, place[:, None]).squeeze(1)
        tokens[group.index] = torch.where(group.z.amax(dim=-1).isfinite(), drawn, NO_TOKEN)  # amax propagates NaN
    return tokens


def draw_places(z: Tensor, settings: DrawSettings) -> Tensor:
    """Draw one column of each line from softmax(z / temperature) after top_k, then min_p, then top_p; [S] int64.

    The draw is an inverse transform over the probabilities in order of token id, so it depends on nothing but its own
    line and its own random number.

    z: [S, K] float32, −inf for tokens that are already excluded.
    """
    best, first = z.max(dim=-1, keepdim=True)
    greedy = settings.temperature == 0
    if greedy.all():
        return first.squeeze(1)
    temperature = torch.where(greedy, 1.0, settings.temperature)[:, None]
    mass = ((z - best) / temperature).exp()  # the best token has mass 1
    if ((settings.top_k > 0) | (settings.top_p < 1)).any():
        mass = mass * _filtered(mass, settings)
    else:
        mass = mass * (mass >= settings.min_p[:, None])
    return torch.where(greedy, first.squeeze(1), inverse_transform(mass, settings.uniform))


def _filtered(mass: Tensor, settings: DrawSettings) -> Tensor:
    """The tokens that pass top_k, then min_p, then top_p of the remaining mass; [S, K] bool.

    mass: [S, K] float32, 1 for the best token.
    """
    ordered, order = torch.sort(mass, dim=-1, descending=True, stable=True)
    rank = torch.arange(mass.shape[1], device=mass.device)
    top_k, top_p = settings.top_k[:, None], settings.top_p[:, None]
    kept = ((rank < top_k) | (top_k == 0)) & (ordered >= settings.min_p[:, None])
    kept_mass = (ordered * kept).double()
    cumulative = kept_mass.cumsum(dim=-1)
    kept &= (cumulative - kept_mass < top_p * cumulative[:, -1:]) | (top_p >= 1)
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(1, order, kept)
