"""Edits of the principled logits, before the direction is added: e of docs/design.md, section 2, step 1.

The direction is not edited, so the ratio does not multiply an edit. The order is: repetition penalty, presence and
frequency penalties, biases, forbidden tokens.
"""

from collections.abc import Collection
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from linalign.alignment_core.request import SamplingParams
from linalign.alignment_core.scheduling.sequence import NextToken, Sequence
from linalign.alignment_core.transfer import to_device


def edit(y: Tensor, next_tokens: Seq[NextToken]) -> None:
    """Edit the lines of y, [S, V] float32, in place, except those whose next token is given."""
    for line, (sequence, position) in zip(y, next_tokens, strict=True):
        if sequence.params.edits and position >= 0:
            sequence.edits = sequence.edits or Edits(sequence, y.device)
            sequence.edits.apply(line, sequence, position)


class Edits:
    """The edits of one sequence, as tensors on the device. They are made once and grow with the reply, because a client
    may name a thousand tokens, and a prompt has more.
    """

    def __init__(self, sequence: Sequence, device: torch.device) -> None:
        params, prompt = sequence.params, sequence.prompt
        self._device = device
        self._biased = self._ids(params.logit_bias)
        self._biases = self._on_device(torch.tensor(list(params.logit_bias.values()), dtype=torch.float32))
        self._ends, self._later_ends = (
            torch.tensor(list(sequence.unwanted_ends(position)), dtype=torch.int64) for position in (0, 1 << 62)
        )
        # Tokens with penalties: those of the principled prompts, then those that only the reply has.
        repeated = (*prompt.principled, prompt.given) if params.repetition_penalty != 1 else ()
        seen = {id for ids in repeated for id in ids}
        self._places = {id: place for place, id in enumerate(seen)}
        self._seen, self._times = self._ids(seen), torch.zeros(len(seen), device=device)
        self._num_counted = 0  # tokens of the reply

    def apply(self, y: Tensor, sequence: Sequence, position: int) -> None:
        """Edit one line in place. y: [V] float32."""
        if sequence.params.penalises:
            assert position == max(sequence.num_replied, 0)
            self._count(sequence)
            y[self._seen] = self._penalised(y[self._seen], sequence.params)
        if len(self._biased):
            y[self._biased] += self._biases
        forbidden = self._forbidden(y, sequence, position)
        if forbidden is not None:
            y.masked_fill_(to_device(forbidden, y.device), -torch.inf)

    def _penalised(self, logits: Tensor, params: SamplingParams) -> Tensor:
        """The penalised logits. logits: Those of the tokens in `_seen`."""
        if params.repetition_penalty != 1:
            divided, multiplied = logits / params.repetition_penalty, logits * params.repetition_penalty
            logits = torch.where(logits > 0, divided, multiplied)
        presence = torch.where(self._times > 0, params.presence_penalty, 0.0)
        return logits - presence - params.frequency_penalty * self._times

    def _count(self, sequence: Sequence) -> None:
        """Count the tokens that were drawn since the last call."""
        replied = sequence.output_ids[len(sequence.prompt.given) + self._num_counted :]
        new = [id for id in dict.fromkeys(replied) if id not in self._places]
        self._num_counted += len(replied)
        self._places |= {id: len(self._places) + i for i, id in enumerate(new)}
        if new:
            self._seen = torch.cat([self._seen, self._ids(new)])
            self._times = torch.cat([self._times, torch.zeros(len(new), device=self._device)])
        if replied:
            places = self._ids([self._places[id] for id in replied])
            self._times.index_add_(0, places, torch.ones(len(replied), device=self._device))

    def _forbidden(self, y: Tensor, sequence: Sequence, position: int) -> Tensor | None:
        """The forbidden tokens, [V] bool on the host; None if there are none."""
        if sequence.thinking is not None and (forced := sequence.thinking.forced) is not None:
            return torch.ones(len(y), dtype=torch.bool).index_fill(0, torch.tensor([forced]), value=False)
        matcher = sequence.matcher
        unwanted = self._ends if position < sequence.params.min_tokens else self._later_ends
        if matcher is None and not len(unwanted):
            return None
        forbidden = torch.zeros(len(y), dtype=torch.bool)
        if matcher is not None:
            forbidden = torch.from_numpy(~matcher.allowed(len(y)))
        unended = forbidden.index_fill(0, unwanted, value=True)
        return forbidden if unended.all() else unended  # a complete structure may end the reply

    def _ids(self, ids: Collection[int]) -> Tensor:
        return self._on_device(torch.tensor(list(ids), dtype=torch.int64))

    def _on_device(self, values: Tensor) -> Tensor:
        return to_device(values, self._device)
