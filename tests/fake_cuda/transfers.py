"""Copies between the host and the device that are on their way: nobody has waited for them yet."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fake_cuda.memory import Fault, spoil


@dataclass(eq=False)
class Download:
    """To the host's pinned memory, where there is nothing to be read before it has arrived."""

    target: Tensor
    numbers: Tensor

    def __post_init__(self) -> None:
        spoil(self.target)

    def arrive(self) -> None:
        self.target.copy_(self.numbers)


@dataclass(eq=False)
class Upload:
    """From the host's pinned memory, which the device may read as late as it arrives."""

    source: Tensor
    numbers: Tensor
    place: str

    def arrive(self) -> None:
        if bytes_of(self.source) != bytes_of(self.numbers):
            raise Fault(f"pinned memory was overwritten before it was copied to the device, {self.place}")


class Transfers:
    """In the order in which they were begun, and arrive. num_begun: since the start."""

    def __init__(self) -> None:
        self.num_begun = 0
        self._on_their_way: deque[Download | Upload] = deque()

    def begin(self, transfer: Download | Upload) -> None:
        self.num_begun += 1
        self._on_their_way.append(transfer)

    def arrive(self, num_begun: int | None = None) -> None:
        """All, or those among the first `num_begun`. Of several Faults the first is told."""
        left = 0 if num_begun is None else self.num_begun - num_begun
        try:
            while len(self._on_their_way) > left:
                self._on_their_way.popleft().arrive()
        except Fault:
            self._on_their_way.clear()
            raise


def bytes_of(x: Tensor) -> bytes:
    """So that NaN is itself, and −0 is not 0."""
    return x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().tobytes()
