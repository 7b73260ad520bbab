"""The fake device's memory: blocks, their owners and sizes, and what graphs may overwrite."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Fault(RuntimeError):
    """An error that a GPU would raise, or a mistake that it would not report."""


@dataclass(eq=False)
class Arena:
    """Memory of eager operations, or of the graphs of one pool."""

    allocated: int = 0  # bytes in use
    reserved: int = 0  # bytes held, in use or cached


class Block:
    """The memory of one storage. It is freed when no device tensor refers to the block any more.

    graph: The graph that was being captured when it was allocated, or None.
    """

    def __init__(self, storage: torch.UntypedStorage, arena: Arena, graph: "Graph | None") -> None:
        self._storage, self._arena, self.graph = storage, arena, graph  # holding the storage keeps its address unique

    def __del__(self) -> None:
        self._arena.allocated -= self._storage.nbytes()


class Allocator:
    """torch's caching allocator without rounding and fragmentation.

    total: Bytes of the device. peak: Most bytes allocated. graph: The graph that is being captured, or None.
    """

    current: "Allocator"  # of the device entered last

    def __init__(self, total: int = 80 << 30) -> None:
        self.total = total
        self.peak = 0
        self.graph: Graph | None = None
        self._eager = Arena()
        self._arenas = [self._eager]
        self._blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()

    @property
    def allocated(self) -> int:
        return sum(arena.allocated for arena in self._arenas)

    @property
    def free(self) -> int:
        return self.total - sum(arena.reserved for arena in self._arenas)

    def empty_cache(self) -> None:
        self._eager.reserved = self._eager.allocated

    def reset_peak(self) -> None:
        self.peak = self.allocated

    def new_pool(self) -> "Pool":
        pool = Pool()
        self._arenas.append(pool.arena)
        return pool

    def block_of(self, inner: Tensor) -> Block:
        """The block of a tensor's storage; a new one for a storage that is new to the device."""
        storage = inner.untyped_storage()
        block = self._blocks.get(storage._cdata)
        if block is None:
            arena = self._take(storage.nbytes())
            block = self._blocks[storage._cdata] = Block(storage, arena, self.graph)
            if self.graph is not None:
                self.graph.blocks.append((weakref.ref(block), inner))
        return block

    def _take(self, num_bytes: int) -> Arena:
        """Allocate bytes, emptying the cache if needed. Raises OutOfMemoryError if too few are free even then."""
        arena = self._eager if self.graph is None else self.graph.memory.arena
        more = max(0, arena.allocated + num_bytes - arena.reserved)
        if more > self.free:
            self.empty_cache()
            more = max(0, arena.allocated + num_bytes - arena.reserved)
        if more > self.free:
            raise torch.OutOfMemoryError(f"{num_bytes} bytes of {self.total}, {self.free} free")
        arena.allocated += num_bytes
        arena.reserved += more
        self.peak = max(self.peak, self.allocated)
        return arena


Allocator.current = Allocator()


@dataclass(eq=False)
class Pool:
    """Memory shared by graphs, which are kept in the order of their captures."""

    arena: Arena = field(default_factory=Arena)
    graphs: list["Graph"] = field(default_factory=list)

    def add(self, graph: "Graph") -> None:
        """Add a captured graph. Earlier graphs with freed blocks overwrite the tensors that it holds: these may lie in
        the freed memory. The graph can't overwrite what earlier graphs hold: allocated memory is not reused.
        """
        kept = [tensor for block, tensor in graph.blocks if block() is not None]
        for earlier in self.graphs:
            if any(block() is None for block, _ in earlier.blocks):
                earlier.overwrites += kept
        self.graphs.append(graph)


class Graph:
    """Recorded operations, replayed on the same memory.

    blocks: Blocks allocated during the capture, each with its tensor.
    overwrites: Tensors of later graphs that may share this graph's memory.
    num_replays: Number of replays so far.
    """

    def __init__(self) -> None:
        self.memory = Pool()
        self.blocks: list[tuple[weakref.ref[Block], Tensor]] = []
        self.overwrites: list[Tensor] = []
        self.num_replays = 0
        self._steps: list[Callable[[], object]] = []
        self._foreign: dict[int, tuple[weakref.ref[Block], str]] = {}  # blocks allocated elsewhere, and where used

    def record(self, step: Callable[[], object], blocks: Iterable[Block], place: Callable[[], str]) -> None:
        """Record a step. blocks: The blocks that it reads and writes, where they existed before the step."""
        self._steps.append(step)
        for block in blocks:
            if block.graph is not self and id(block) not in self._foreign:
                self._foreign[id(block)] = weakref.ref(block), place()

    @torch.inference_mode()
    def replay(self) -> None:
        self.num_replays += 1
        for block, place in self._foreign.values():
            if block() is None:
                raise Fault(f"a graph uses memory that is free by now, {place}")
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # the steps run on the inner CPU tensors
            for tensor in self.overwrites:
                spoil(tensor)
            for step in self._steps:
                step()

    def pool(self) -> Any:
        return self.memory


def spoil(x: Tensor) -> None:
    """Fill uninitialised memory with NaN or a large negative integer, so that tests notice when it is read."""
    if x.dtype.itemsize == 1:
        x.view(torch.uint8).fill_(0x7F)  # NaN in float8_e4m3fn
    else:
        x.fill_(torch.nan if x.dtype.is_floating_point else -(1 << 30))
