"""Asynchronous copies between host and device that are pending: no wait has completed them yet."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fake_cuda.memory import Fault, spoil


@dataclass(eq=False)
class Download:
    """A copy into pinned host memory. The target holds garbage until the copy arrives."""

    target: Tensor
    numbers: Tensor

    def __post_init__(self) -> None:
        spoil(self.target)

    def arrive(self) -> None:
        self.target.copy_(self.numbers)


@dataclass(eq=False)
class Upload:
    """A copy from pinned host memory, which the device may read at any time until the copy arrives."""

    source: Tensor
    numbers: Tensor
    place: str

    def arrive(self) -> None:
        if bytes_of(self.source) != bytes_of(self.numbers):
            raise Fault(f"pinned memory was overwritten before it was copied to the device, {self.place}")


class Transfers:
    """Pending copies; they complete in the order in which they began. num_begun: Copies begun since the start."""

    def __init__(self) -> None:
        self.num_begun = 0
        self._on_their_way: deque[Download | Upload] = deque()

    def begin(self, transfer: Download | Upload) -> None:
        self.num_begun += 1
        self._on_their_way.append(transfer)

    def arrive(self, num_begun: int | None = None) -> None:
        """Complete all, or those among the first `num_begun` ever begun. Raises the first Fault and drops the rest."""
        num_pending = 0 if num_begun is None else self.num_begun - num_begun
        try:
            while len(self._on_their_way) > num_pending:
                self._on_their_way.popleft().arrive()
        except Fault:
            self._on_their_way.clear()
            raise


def bytes_of(x: Tensor) -> bytes:
    """The bytes of a tensor, to compare tensors so that NaN equals itself and −0 differs from 0."""
    return x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().tobytes()
