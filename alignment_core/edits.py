"""What requests change in their principled logits before anything else is done: e of DESIGN section 2.1.

The direction is not edited, so every edit counts once, whatever the ratio. In this order: the
repetition penalty, the presence and frequency penalties, the biases, and what may not come at all.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from alignment_core.sequence import Sequence
from alignment_core.transfer import to_device


def edit(y: Tensor, sequences: Seq[Sequence], positions: Seq[int]) -> None:
    """Change the lines of y, [S, V] float32, in place.

    positions: how many tokens of each reply come before; negative where the next token is given: nothing is edited.
    """
    for line, sequence, position in zip(y, sequences, positions, strict=True):
        if sequence.params.edits and position >= 0:
            _edit(line, sequence, position)


def _edit(y: Tensor, sequence: Sequence, position: int) -> None:
    params = sequence.params
    if params.penalises:
        assert position == max(sequence.num_replied, 0)
    if params.repetition_penalty != 1:
        ids = _ids(list(sequence.seen), y)
        y[ids] = torch.where(y[ids] > 0, y[ids] / params.repetition_penalty, y[ids] * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and sequence.counts:
        times = to_device(torch.tensor(list(sequence.counts.values()), dtype=y.dtype), y.device)
        y[_ids(list(sequence.counts), y)] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        y[_ids(list(params.logit_bias), y)] += to_device(torch.tensor(list(params.logit_bias.values())), y.device)
    unwanted = sequence.unwanted_ends(position)
    if sequence.matcher is None and not unwanted:
        return
    forbidden = torch.zeros(len(y), dtype=torch.bool)
    if sequence.matcher is not None:
        allowed = np.frombuffer(sequence.matcher.compute_bitmask(), np.uint8)
        forbidden = torch.from_numpy(np.unpackbits(allowed, count=len(y), bitorder="little") == 0)
    unended = forbidden.clone()
    unended[list(unwanted)] = True
    forbidden = forbidden if unended.all() else unended  # a structure that is complete ends
    y.masked_fill_(to_device(forbidden, y.device), -torch.inf)


def _ids(ids: list[int], y: Tensor) -> Tensor:
    return to_device(torch.tensor(ids, dtype=torch.int64), y.device)
