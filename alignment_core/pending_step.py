"""A step on its way: what it draws, and how that comes back to the host."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from linalign.alignment_core.decoding.logprobs import Logprobs, log_probabilities
from linalign.alignment_core.decoding.static_draw import NO_TOKEN
from linalign.alignment_core.output import TokenLogprob
from linalign.alignment_core.scheduling.scheduler import Step
from linalign.alignment_core.scheduling.sequence import Sequence
from linalign.alignment_core.transfer import to_host

Sampler = Callable[[Tensor, Seq[Sequence], Seq[int]], Tensor]
Drawn = tuple[Tensor, Logprobs | None]


def draw(logits: Tensor, places: Seq[tuple[Sequence, int]], sampler: Sampler) -> Drawn:
    """A token for each place, (sequence, position); where it is given, that one; or NO_TOKEN.

    logits: [R, V], a row for each branch of each place in turn, more behind them where shapes are fixed.
    """
    sequences, positions = zip(*places, strict=True)
    tokens = sampler(logits, sequences, positions)
    for line, (sequence, position) in enumerate(places):
        if position < 0:
            tokens[line] = torch.where(tokens[line] == NO_TOKEN, NO_TOKEN, sequence.prompt.given[position])
    return tokens, log_probabilities(logits, sequences, positions, tokens)


class Flight:
    """A step that has been launched, and the tokens that it draws.

    drawn: tokens in one part or several, each [S] int64, on the device.
    """

    def __init__(self, step: Step, drawn: Seq[Drawn]) -> None:
        self.step = step
        self._host = [  # the next step draws to the same place
            (to_host(tokens), logprobs.to_host() if logprobs else None) for tokens, logprobs in drawn
        ]
        self._arrived = None
        if any(tokens.is_cuda for tokens, _ in drawn):
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> Iterator[tuple[int, tuple[TokenLogprob, ...]]]:
        """The tokens, once they are there, each with what is to be reported of it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        for part, logprobs in self._host:
            tokens: list[int] = part.tolist()
            yield from zip(tokens, logprobs.reports(tokens) if logprobs else [()] * len(tokens), strict=True)
