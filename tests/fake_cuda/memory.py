"""The device's memory: who holds it, how much of it is taken, and what graphs may overwrite."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Fault(RuntimeError):
    """What a GPU would refuse, or not do."""


@dataclass(eq=False)
class Arena:
    """Bytes of eager operations, or of the graphs of one pool. reserved: what it keeps, the most that it has had."""

    allocated: int = 0
    reserved: int = 0


class Block:
    """The memory of one storage; it is free once no tensor of the device is left that holds the block.

    graph: the one that was being captured when it was allocated.
    """

    def __init__(self, storage: torch.UntypedStorage, arena: Arena, graph: "Graph | None") -> None:
        self._storage, self._arena, self.graph = storage, arena, graph  # the storage, so that its address stays its own

    def __del__(self) -> None:
        self._arena.allocated -= self._storage.nbytes()


class Allocator:
    """torch's caching allocator, to the byte: nothing is rounded up, nothing lies in pieces.

    total: bytes of the device. peak: the most that was allocated. graph: the one that is being captured.
    """

    current: "Allocator"  # of the device that was entered last

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
        """Of a tensor's storage; a new one if the device has not seen it."""
        storage = inner.untyped_storage()
        block = self._blocks.get(storage._cdata)
        if block is None:
            arena = self._take(storage.nbytes())
            block = self._blocks[storage._cdata] = Block(storage, arena, self.graph)
            if self.graph is not None:
                self.graph.blocks.append((weakref.ref(block), inner))
        return block

    def _take(self, num_bytes: int) -> Arena:
        """Raises OutOfMemoryError where the device has no more, what is cached given back first."""
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
    """The memory that graphs share, in the order of their captures."""

    arena: Arena = field(default_factory=Arena)
    graphs: list["Graph"] = field(default_factory=list)

    def add(self, graph: "Graph") -> None:
        """After its capture. What it still holds may lie where an earlier graph had something that was free by then,
        and writes it again. The other way round, nobody allocates what is held.
        """
        kept = [tensor for block, tensor in graph.blocks if block() is not None]
        for earlier in self.graphs:
            if any(block() is None for block, _ in earlier.blocks):
                earlier.overwrites += kept
        self.graphs.append(graph)


class Graph:
    """What was recorded, to be done again to the same memory.

    blocks: what its capture allocated, each with the tensor that it was allocated for. overwrites: what else its
    memory may be. num_replays: how often it ran.
    """

    def __init__(self) -> None:
        self.memory = Pool()
        self.blocks: list[tuple[weakref.ref[Block], Tensor]] = []
        self.overwrites: list[Tensor] = []
        self.num_replays = 0
        self._steps: list[Callable[[], object]] = []
        self._foreign: dict[int, tuple[weakref.ref[Block], str]] = {}  # what it did not allocate, and who uses it

    def record(self, step: Callable[[], object], blocks: Iterable[Block], place: Callable[[], str]) -> None:
        """blocks: what the step reads and writes, as far as it was there before."""
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
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # all of it is on the CPU, and known
            for tensor in self.overwrites:
                spoil(tensor)
            for step in self._steps:
                step()

    def pool(self) -> Any:
        return self.memory


def spoil(x: Tensor) -> None:
    """What nobody has written is to be noticed where it is read."""
    if x.dtype.itemsize == 1:
        x.view(torch.uint8).fill_(0x7F)  # NaN in float8_e4m3fn
    else:
        x.fill_(torch.nan if x.dtype.is_floating_point else -(1 << 30))
