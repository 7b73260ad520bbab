"""A launched step: its tokens may still be on their way from the device."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch

from linalign.alignment_core.decoding.sampler import Drawn
from linalign.alignment_core.output import TokenLogprob
from linalign.alignment_core.scheduling.step import Step
from linalign.alignment_core.transfer import to_host


class PendingStep:
    """A step and the tokens that it draws, in the order of `step.next_tokens`.

    drawn: the tokens, in one part or several, on the device.
    """

    def __init__(self, step: Step, drawn: Seq[Drawn]) -> None:
        self.step = step
        # Copies, because the next step draws to the same place.
        self._parts = [Drawn(to_host(part.tokens), [report.to_host() for report in part.reports]) for part in drawn]
        self._arrival = None
        if any(part.tokens.is_cuda for part in drawn):
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def wait(self) -> Iterator[tuple[int, tuple[TokenLogprob, ...]]]:
        """Wait for the device. Yields each token id, with its report if the request needs one."""
        if self._arrival is not None:
            self._arrival.synchronize()
        for part in self._parts:
            yield from part.on_host()
