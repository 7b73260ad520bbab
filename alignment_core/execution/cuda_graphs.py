"""CUDA graphs: functions in a few fixed shapes are captured once, then replayed by a single call of the host."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

SIZES = (1, 2, 4, *range(8, 128, 8))
COARSE = 32  # between sizes beyond those


def padded_size(n: int) -> int:
    """The padded number of lines for n lines, n ≥ 1."""
    return next((size for size in SIZES if size >= n), -(-n // COARSE) * COARSE)


def padded_sizes(max_size: int) -> list[int]:
    """The padded sizes of 1 to `max_size` lines, in ascending order."""
    return sorted({padded_size(n) for n in range(1, max_size + 1)})


class Graphs:
    """Captures one graph per key, all in one memory pool.

    Functions must read and write only tensors of fixed addresses. A function runs twice when its key is new, so it must
    be idempotent. On a CPU functions run without graphs.
    """

    def __init__(self, device: torch.device, capture: bool = True) -> None:
        self._captures = capture and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self.num_runs = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        self.num_runs += 1
        if not self._captures:
            function()
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(function)
        self._graphs[key].replay()

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # allocations of the first call must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        self._pool = self._pool or graph.pool()
        return graph
