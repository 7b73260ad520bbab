"""The fake device: its operations, its checks, its graphs and its events."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.fake_cuda.memory import Allocator, Fault, Graph, Pool, spoil
from tests.fake_cuda.modes import Calls, Dispatch
from tests.fake_cuda.tensor import CudaTensor, caller, converted, inner_of, is_pinned, leaves, place
from tests.fake_cuda.transfers import Download, Transfers, Upload

aten = torch.ops.aten
SEES_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)  # the host must read the values
TAKES_SCALARS = {aten.index_put_.default, aten.index_put.default, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}


class Stream:
    def wait_stream(self, _: "Stream") -> None:
        pass


class Event:
    """Synchronising it completes all copies that began before it was recorded."""

    def __init__(self, device: "FakeCuda") -> None:
        self._device, self._num_transfers = device, 0

    def record(self) -> None:
        self._num_transfers = self._device.transfers.num_begun

    def synchronize(self) -> None:
        self._device.waits_for("Event.synchronize", self._num_transfers)


class Kernel:
    """A Triton kernel, run by Triton's interpreter on the device's tensors."""

    def __init__(self, device: "FakeCuda", name: str, kernel: Any) -> None:
        self._device, self._name, self._kernel = device, name, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if any(isinstance(x, Tensor) and not isinstance(x, CudaTensor) for x in args):
            raise Fault(f"a kernel is given the host's memory, {place()}")
        again = partial(self._kernel[grid], *map(inner_of, args), **constants)
        again()
        self._device.launches[self._name] += 1
        self._device.record(again, args)


class FakeCuda:
    """The device; operations reach it inside its `with` block.

    waits: Number of synchronisations of the host, by "file:function: operation".
    memory: The allocator; it counts and limits memory.
    transfers: Asynchronous copies that are pending.
    launches: Number of Triton kernel launches by kernel name, without graph replays.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.memory = Allocator()
        self.transfers = Transfers()
        self.launches: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "FakeCuda":
        torch._C._ensureCUDADeviceGuardSet()
        Allocator.current = self.memory
        self._stack.enter_context(Dispatch(self))
        self._stack.enter_context(Calls(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            self.transfers.arrive()

    def take(self, model: nn.Module) -> None:
        """Move a model to the device. (Module.to would change the type of its tensors in place.)"""
        moved: dict[int, Tensor] = {}
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and id(tensor) not in moved:
                    there = CudaTensor(tensor.detach())
                    moved[id(tensor)] = nn.Parameter(there, False) if name in module._parameters else there
                if tensor is not None:
                    setattr(module, name, moved[id(tensor)])

    def patch(self, monkeypatch: Any, *kernels: tuple[Any, str]) -> None:
        """Replace torch.cuda's functions by this device's, and each kernel (module, name) by one that it launches."""
        stream, memory = Stream(), self.memory
        for name, value in {
            "Event": partial(Event, self),
            "Stream": lambda: stream,
            "current_stream": lambda *_: stream,
            "stream": contextlib.nullcontext,
            "CUDAGraph": Graph,
            "graph": self._capture,
            "empty_cache": self._empty_cache,
            "mem_get_info": lambda *_: (memory.free, memory.total),
            "memory_allocated": lambda *_: memory.allocated,
            "max_memory_allocated": lambda *_: memory.peak,
            "reset_peak_memory_stats": lambda *_: memory.reset_peak(),
            "get_device_capability": lambda *_: (9, 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for module, name in kernels:
            monkeypatch.setattr(module, name, Kernel(self, name, getattr(module, name)))

    @contextlib.contextmanager
    def _capture(self, graph: Graph, pool: Pool | None = None, **_: object) -> Iterator[None]:
        assert self.memory.graph is None
        graph.memory = pool or self.memory.new_pool()
        self.memory.graph = graph
        try:
            yield
        finally:
            self.memory.graph = None
        graph.memory.add(graph)

    def _empty_cache(self) -> None:
        self._refuse_in_capture("empty_cache")
        self.memory.empty_cache()

    def _refuse_in_capture(self, what: str) -> None:
        if self.memory.graph is not None:
            raise Fault(f"a capture refuses {what}, {place()}")

    def waits_for(self, what: str, num_transfers: int | None = None) -> None:
        """Count a synchronisation. The first `num_transfers` transfers complete, or all if it is None."""
        self._refuse_in_capture(what)
        frame = caller()
        self.waits[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}: {what}"] += 1
        self.transfers.arrive(num_transfers)

    def record(self, step: Callable[[], object], operands: Iterable[object] = ()) -> None:
        if self.memory.graph is not None:
            blocks = [x.block for x in operands if isinstance(x, CudaTensor)]
            self.memory.graph.record(step, blocks, place)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on the device."""
        tensors = [x for x in leaves((*args, *kwargs.values())) if isinstance(x, Tensor)]
        self._check(func, args, tensors)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._refuse_in_capture(f"{func}, which draws random numbers")
        wrappers = {id(x.inner): x for x in tensors if isinstance(x, CudaTensor)}
        args = converted(inner_of, args)
        kwargs = {name: converted(inner_of, value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        if func in EMPTY:
            spoil(result)
            self.record(partial(spoil, result))
        else:
            self.record(partial(repeat, func, args, kwargs, result), tensors)
        return converted(lambda x: wrappers[id(x)] if id(x) in wrappers else CudaTensor(x), result)

    def make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CudaTensor:
        """Create a tensor with a function that takes no tensors. kwargs: With the host as device."""
        made = func(*args, **kwargs)
        if func is torch.empty:
            spoil(made)
        self.record(lambda: spoil(made) if func is torch.empty else made.copy_(func(*args, **kwargs)))
        return CudaTensor(made)

    def _check(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        indices = [x for x in leaves(args[1:2]) if isinstance(x, Tensor)] if "index" in str(func) else []
        is_mask = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        takes_indices = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
        if is_mask or (any(tag in func.tags for tag in SEES_VALUES) and not takes_indices):
            self.waits_for(str(func))
        strangers = [x for x in tensors if not isinstance(x, CudaTensor)]
        if takes_indices and any(x is y for x in strangers for y in indices):
            self.waits_for(f"{func} with an index on the host")
            strangers = [x for x in strangers if not any(x is y for y in indices)]
        if any(x.dim() or not (torch.Tag.pointwise in func.tags or func in TAKES_SCALARS) for x in strangers):
            raise Fault(f"{func} has operands on two devices, {place()}")

    def to_device(self, source: Tensor, non_blocking: bool) -> Tensor:
        """A copy of a host tensor's values for the device. Pinned and `non_blocking`: the copy stays pending."""
        self._refuse_in_capture("a copy from the host")
        if not (non_blocking and is_pinned(source)):
            self.waits_for("a copy from the host" if is_pinned(source) else "a copy from pageable memory")
        else:
            self.transfers.begin(Upload(source, source.clone(), place()))
        return source.clone()

    def to_host(self, source: Tensor, target: Tensor, non_blocking: bool) -> Tensor:
        """Copy to `target` on the host: at once if the host waits, else when an event is synchronised."""
        if not non_blocking or not is_pinned(target):
            self.waits_for("a copy to the host")
            return target.copy_(source)
        self._refuse_in_capture("a copy to the host")
        self.transfers.begin(Download(target, source.clone()))
        return target


def repeat(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Compute an operation again and write its new values into the tensors of its old result."""
    again = func(*args, **kwargs)
    returns = func._schema.returns
    for kind, old, new in zip(returns, as_list(result), as_list(again), strict=False):
        if kind.alias_info is None:
            for target, source in zip(as_list(old), as_list(new), strict=True):
                target.copy_(source)


def as_list(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]
