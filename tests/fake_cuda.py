"""A CUDA device made of a CPU: tensors that say they are on `cuda`, whose numbers a CPU computes.

Unlike torch's FakeTensorMode its tensors have values, so that the oracle can judge whole replies, and CUDA graphs
replay. It is as strict as a device: operands on two devices are a Fault, `empty` is full of NaN, what the device
copies to the host is there after an event only, and a graph repeats what it has recorded and runs no Python. Whatever
makes the host wait for the device is written down with the line that asked for it.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
HOST = torch.device("cpu")
TORCH = str(Path(torch.__file__).parent)
SEES_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)  # the host must read to go on
TAKES_SCALARS = {aten.index_put_.default, aten.index_put.default, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}
UNGUARDED = {  # torch's own bindings ask for CUDA's device guard
    Tensor.copy_: aten.copy_,
    Tensor.__invert__: aten.bitwise_not,
    Tensor.__int__: lambda x: int(x.item()),
    Tensor.nonzero: lambda x, as_tuple=False: aten.nonzero(x).unbind(1) if as_tuple else aten.nonzero(x),
}
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}


class Fault(RuntimeError):
    """What a GPU would refuse, or not do."""


class CudaTensor(torch.Tensor):
    """A tensor on the made-up device. inner: its numbers, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "CudaTensor":
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        wrapped = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=CUDA, **shape)
        wrapped.inner = inner
        return wrapped

    def __repr__(self) -> str:
        return f"CudaTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: object) -> Any:
        raise Fault(f"{func} without the device")


class Stream:
    def wait_stream(self, _: "Stream") -> None:
        pass


class Event:
    """Copies to the host that were begun before it was recorded are there once it is synchronised."""

    def __init__(self, device: "FakeCuda") -> None:
        self._device = device

    def record(self) -> None:
        self._copies, self._device.copies = self._device.copies, []

    def synchronize(self) -> None:
        self._device.waits_for("Event.synchronize")
        for target, source in self._copies:
            target.copy_(source)


@dataclass
class Graph:
    """What was recorded, to be done again to the same memory."""

    steps: list[Callable[[], object]] = field(default_factory=list)
    num_replays: int = 0

    @torch.inference_mode()
    def replay(self) -> None:
        self.num_replays += 1
        for step in self.steps:
            step()

    def pool(self) -> str:
        return "pool"


class Kernel:
    """Triton's kernel, which its interpreter runs, for tensors on the device."""

    def __init__(self, device: "FakeCuda", kernel: Any) -> None:
        self._device, self._kernel = device, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if any(isinstance(x, Tensor) and not isinstance(x, CudaTensor) for x in args):
            raise Fault(f"a kernel is given the host's memory, {place()}")
        again = partial(self._kernel[grid], *map(inner_of, args), **constants)
        again()
        self._device.num_launches += 1
        self._device.record(again)


class FakeCuda:
    """The device, while it is entered.

    waits: how often the host has waited for it, by "file:function: operation".
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.num_launches = 0
        self._graph: Graph | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "FakeCuda":
        torch._C._ensureCUDADeviceGuardSet()
        self._stack.enter_context(Dispatch(self))
        self._stack.enter_context(Calls(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self, model: nn.Module) -> None:
        """Move a model here. (Module.to would change its tensors' type in place.)"""
        moved: dict[int, Tensor] = {}
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and id(tensor) not in moved:
                    there = CudaTensor(tensor.detach())
                    moved[id(tensor)] = nn.Parameter(there, False) if name in module._parameters else there
                if tensor is not None:
                    setattr(module, name, moved[id(tensor)])

    def patch(self, monkeypatch: Any, *kernels: tuple[Any, str]) -> None:
        """Let torch.cuda be this device, and kernels, (module, name), be launched on it."""
        stream = Stream()
        for name, value in {
            "Event": partial(Event, self),
            "Stream": lambda: stream,
            "current_stream": lambda *_: stream,
            "stream": contextlib.nullcontext,
            "CUDAGraph": Graph,
            "graph": self._capture,
            "empty_cache": partial(self._refuse_in_capture, "empty_cache"),
            "get_device_capability": lambda *_: (9, 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for module, name in kernels:
            monkeypatch.setattr(module, name, Kernel(self, getattr(module, name)))

    @contextlib.contextmanager
    def _capture(self, graph: Graph, **_: object) -> Iterator[None]:
        assert self._graph is None
        self._graph = graph
        try:
            yield
        finally:
            self._graph = None

    def _refuse_in_capture(self, what: str) -> None:
        if self._graph is not None:
            raise Fault(f"a capture refuses {what}, {place()}")

    def waits_for(self, what: str) -> None:
        """The host stands still until the device has come so far."""
        self._refuse_in_capture(what)
        frame = caller()
        self.waits[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}: {what}"] += 1

    def record(self, step: Callable[[], object]) -> None:
        if self._graph is not None:
            self._graph.steps.append(step)

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation on the device."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self._check(func, args, tensors)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._refuse_in_capture(f"{func}, which draws random numbers")
        wrappers = {id(x.inner): x for x in tensors if isinstance(x, CudaTensor)}
        args, kwargs = (tree_map_only(Tensor, inner_of, x) for x in (args, kwargs))
        result = func(*args, **kwargs)
        if func in EMPTY:
            spoil(result)
            self.record(partial(spoil, result))
        else:
            self.record(partial(repeat, func, args, kwargs, result))
        return tree_map_only(Tensor, lambda x: wrappers[id(x)] if id(x) in wrappers else CudaTensor(x), result)

    def make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CudaTensor:
        """A new tensor of a function that takes none. kwargs: for the host."""
        made = func(*args, **kwargs)
        if func is torch.empty:
            spoil(made)
        self.record(lambda: spoil(made) if func is torch.empty else made.copy_(func(*args, **kwargs)))
        return CudaTensor(made)

    def _check(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)] if "index" in str(func) else []
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
        """The numbers of a tensor on the host, as the device gets them."""
        self._refuse_in_capture("a copy from the host")
        if not (non_blocking and is_pinned(source)):
            self.waits_for("a copy from the host" if is_pinned(source) else "a copy from pageable memory")
        return source.clone()

    def to_host(self, source: Tensor, target: Tensor, non_blocking: bool) -> Tensor:
        """target: on the host; it gets the numbers at once where the host waits, otherwise after an event."""
        if not non_blocking or not is_pinned(target):
            self.waits_for("a copy to the host")
            return target.copy_(source)
        self._refuse_in_capture("a copy to the host")
        self.copies.append((target, source.clone()))
        spoil(target)
        return target


class Dispatch(TorchDispatchMode):
    """Every operation on tensors: those of the device go there."""

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode those operations come here that others are made of
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        device = self._device
        target = kwargs.get("device")
        if func is aten._to_copy.default and target is not None and target.type != args[0].device.type:
            return self._transfer(args[0], target, **kwargs)
        if func is aten.copy_.default and args[0].device != args[1].device:
            non_blocking = bool(args[2:] and args[2]) or kwargs.get("non_blocking", False)
            if isinstance(args[0], CudaTensor):
                return device.compute(func, (args[0], CudaTensor(device.to_device(args[1], non_blocking))), {})
            return device.to_host(args[1].inner, args[0], non_blocking)
        on_device = any(isinstance(x, CudaTensor) for x in tree_leaves((args, kwargs)))
        if target is None or not on_device or target.type == "cuda":
            kwargs = kwargs | {"device": HOST} if target is not None else kwargs
        if on_device or (target is not None and target.type == "cuda"):
            return device.compute(func, args, kwargs)
        return func(*args, **kwargs)

    def _transfer(
        self, source: Tensor, target: torch.device, non_blocking: bool = False, dtype: Any = None, **_: Any
    ) -> Tensor:
        dtype = dtype or source.dtype
        if target.type == "cuda":
            return CudaTensor(self._device.to_device(source, non_blocking).to(dtype))
        inner = source.inner.to(dtype)
        host = torch.empty_like(inner)
        return self._device.to_host(inner, pinned(host) if non_blocking else host, non_blocking)


class Calls(TorchFunctionMode):
    """Calls that a build of torch without CUDA would not let come as far as `Dispatch`."""

    def __init__(self, device: FakeCuda) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if kwargs.pop("pin_memory", False):
            return pinned(func(*args, **kwargs))
        is_there = bool(args) and isinstance(args[0], CudaTensor)
        if func is Tensor.pin_memory:
            return pinned(args[0].clone())
        if func in UNGUARDED:
            return UNGUARDED[func](*args, **kwargs)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if is_there and name in ("data_ptr", "tolist", "numpy"):
            if name != "data_ptr":
                self._device.waits_for(name)
            return func(args[0].inner)
        if is_there and name == "__getitem__":
            return self._get(*args)
        if is_there and name == "__setitem__":
            return self._set(*args)
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "cuda" and not is_there:
            if func in FROM_DATA:
                self._device.waits_for(name)
            return self._device.make(func, args, kwargs | {"device": HOST})
        return func(*args, **kwargs)

    def _get(self, x: CudaTensor, index: Any) -> Tensor:
        view, indices = self._view(x.inner, index)
        return aten.index.Tensor(CudaTensor(view), indices) if indices else CudaTensor(view)

    def _set(self, x: CudaTensor, index: Any, value: Any) -> None:
        view, indices = self._view(x.inner, index)
        if not isinstance(value, Tensor):
            value = self._device.make(torch.full, ((), value), {"dtype": x.dtype})
        if indices:
            aten.index_put_.default(CudaTensor(view), indices, value.to(x.dtype))
        else:
            aten.copy_.default(CudaTensor(view), value)

    def _view(self, x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
        """What numbers, slices and new dimensions leave of x, and the indices that are tensors, by dimension."""
        items = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [item for item in items if not isinstance(item, Tensor)]:
            at = next(i for i, item in enumerate(items) if item is Ellipsis)
            missing = x.dim() - sum(item is not None for item in items) + 1
            items = (*items[:at], *[slice(None)] * missing, *items[at + 1 :])
        indices: list[Tensor | None] = []
        dim = 0
        for item in items:
            if isinstance(item, list):
                self._device.waits_for("a list as an index")
                item = CudaTensor(torch.tensor(item))
            if isinstance(item, Tensor):
                indices += [None] * (dim - len(indices))
                indices.append(item)
                dim += item.dim() if item.dtype == torch.bool else 1
            elif item is None:
                x = x.unsqueeze(dim)
                dim += 1
            elif isinstance(item, slice):
                x = x[(slice(None),) * dim + (item,)]
                dim += 1
            else:
                x = x.select(dim, item)
        return x, indices

    def _to(self, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or x.device, dtype or x.dtype
        if not copy and device.type == x.device.type and dtype == x.dtype:
            return x
        options = {"memory_format": memory_format} if memory_format is not None else {}
        return aten._to_copy(x, dtype=dtype, device=device, non_blocking=non_blocking, **options)


def inner_of(x: Any) -> Any:
    return x.inner if isinstance(x, CudaTensor) else x


def pinned(x: Tensor) -> Tensor:
    x.is_fake_pinned = True
    return x


def is_pinned(x: Tensor) -> bool:
    return getattr(x, "is_fake_pinned", False)


def repeat(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Let the result of an operation have the numbers that it would have now, in its place."""
    again = func(*args, **kwargs)
    returns = func._schema.returns
    for kind, old, new in zip(returns, as_list(result), as_list(again), strict=False):
        if kind.alias_info is None:
            for target, source in zip(as_list(old), as_list(new), strict=True):
                target.copy_(source)


def as_list(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]


def spoil(x: Tensor) -> None:
    """What nobody has written is to be noticed where it is read."""
    if x.dtype.itemsize == 1:
        x.view(torch.uint8).fill_(0x7F)  # NaN in float8_e4m3fn
    else:
        x.fill_(torch.nan if x.dtype.is_floating_point else -(1 << 30))


def caller() -> FrameType:
    """Who has called the operation: the innermost frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not (name.startswith((TORCH, "<")) or name == __file__ or name.endswith("/contextlib.py")):
            return frame
        frame = frame.f_back
    raise AssertionError("no caller")


def place() -> str:
    frame = caller()
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
