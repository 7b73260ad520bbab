"""The policy of a step: what its tokens are drawn from, computed once for draw, log-probabilities and traces."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from linalign.alignment_core.decoding import static_draw
from linalign.alignment_core.decoding.alignment import (
    Mixing,
    adaptive,
    difference,
    is_finite,
    opad,
    principled_logits,
    weighted,
)
from linalign.alignment_core.decoding.candidates import Candidates, candidates, indices
from linalign.alignment_core.decoding.draw_settings import DrawSettings
from linalign.alignment_core.decoding.edits import edit
from linalign.alignment_core.decoding.static_draw import Filters
from linalign.alignment_core.methods import starts_from_base
from linalign.alignment_core.scheduling.sequence import NextToken
from linalign.alignment_core.transfer import to_device


class Policy:
    """The aligned policies of S next tokens, before temperature and filters. Line i is next_tokens[i].

    logits: [rows, V] float32, never changed: the branches of each next token in turn (principled, then base).
    A sequence may have several next tokens, at as many positions.
    """

    def __init__(self, logits: Tensor, next_tokens: Seq[NextToken]) -> None:
        self.logits = logits
        self.next_tokens = next_tokens
        self.host_settings = DrawSettings.of(next_tokens)
        settings = self.host_settings.to(logits.device)
        mixing, self.directions = mix_by_logits(logits, settings.mixing, next_tokens)
        self.settings = replace(settings, mixing=mixing)  # where the logits are

    @cached_property
    def edited(self) -> Tensor:
        """The mixed and edited principled logits, [S, V] float32: y of docs/design.md, section 2, step 1."""
        y = principled_logits(self.logits, self.settings.mixing)
        edit(y, self.next_tokens)
        return y

    @cached_property
    def filters(self) -> Filters:
        return Filters.of(self.host_settings)

    @cached_property
    def is_greedy(self) -> Tensor:
        """[S] bool, on the host: plain lines at temperature 0, which draw the best token of `edited`."""
        return ~self.host_settings.aligned & (self.host_settings.temperature == 0)

    @cached_property
    def is_finite(self) -> Tensor:
        """[S] bool: whether all rows of a line are free of NaN and +∞."""
        return is_finite(self.logits, self.settings.mixing)

    @cached_property
    def candidates(self) -> list[Candidates]:
        """The tokens that can be drawn, with their mixed logits.

        On a CPU few tokens, and none for greedy lines. On CUDA all tokens of all lines in one group, because the host
        does not wait to see which of them matter.
        """
        if self.edited.is_cuda:
            token_ids = torch.arange(self.edited.shape[1], device=self.edited.device).expand(self.edited.shape)
            z = static_draw.mixed_logits(self.logits, self.edited, self.settings, self.filters)
            return [Candidates(slice(None), token_ids, z)]
        if self.is_greedy.all():
            return []
        index = indices(~self.is_greedy)
        lines = torch.arange(len(self.edited))[index]
        return [
            Candidates(lines[group.index] if isinstance(index, Tensor) else group.index, group.token_ids, group.z)
            for group in candidates(self.logits, self.edited[index], self.settings[index])
        ]


def mix_by_logits(
    logits: Tensor, mixing: Mixing, next_tokens: Seq[NextToken]
) -> tuple[Mixing, Mapping[NextToken, Tensor]]:
    """The mixing of methods whose coefficients depend on the logits: adaptive and OPAD.

    mixing: as planned without logits. Returns the final mixing, and the directions, [V], that OPAD needs for the next
    tokens of its sequences: they become `Sequence.directions` once the step is drawn.
    """
    coefficients, addition, row = mixing.coefficients, mixing.addition, 0
    directions: dict[NextToken, Tensor] = {}
    for line, next_token in enumerate(next_tokens):
        sequence, position = next_token
        rows, prompt = logits[row : row + len(sequence.branches)], sequence.prompt
        row += len(rows)
        if prompt.base is None or not prompt.mixes_by_logits:
            continue
        weights, planned = to_device(torch.tensor([prompt.weights, prompt.coefficients]), logits.device)
        if prompt.method == "adaptive":
            mean = weighted(weights[:, None], rows[:-1]).sum(dim=0)
            limited = adaptive(planned, weights, mean, rows[-1])
            away = int(starts_from_base(prompt.coefficients))
            coefficients = coefficients.clone() if coefficients is mixing.coefficients else coefficients
            coefficients[line, away : away + len(weights)] = limited + away * weights
        else:
            now = directions[next_token] = planned @ difference(rows[:-1], rows[-1])
            before = directions.get(NextToken(sequence, position - 1), sequence.directions.get(position - 1))
            if addition is None:
                addition = torch.zeros(len(next_tokens), logits.shape[1], device=logits.device)
            addition[line] = opad(now, before)
    return replace(mixing, coefficients=coefficients, addition=addition), directions
