"""Torch modes that route operations to the fake device: every dispatched one, and calls that need CUDA in torch."""

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda.tensor import HOST, CudaTensor, is_pinned, leaves, pinned

if TYPE_CHECKING:
    from tests.fake_cuda.device import FakeCuda

aten = torch.ops.aten
UNGUARDED = {  # torch's own bindings of these require CUDA's device guard
    Tensor.copy_: aten.copy_,
    Tensor.__invert__: aten.bitwise_not,
    Tensor.__int__: lambda x: int(x.item()),
    Tensor.__float__: lambda x: float(x.item()),
    Tensor.__index__: lambda x: operator.index(x.item()),
    Tensor.nonzero: lambda x, as_tuple=False: aten.nonzero(x).unbind(1) if as_tuple else aten.nonzero(x),
}
FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}


class Dispatch(TorchDispatchMode):
    """Intercepts every tensor operation and sends those with device tensors to the device."""

    def __init__(self, device: "FakeCuda") -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = list(leaves((*args, *kwargs.values())))
        if not any(isinstance(x, CudaTensor | torch.device) for x in operands):
            return func(*args, **kwargs)  # an operation on the host
        with self:  # in inference mode, composite operations arrive here undecomposed
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
        on_device = any(isinstance(x, CudaTensor) for x in operands)
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
    """Replaces calls that fail in a torch build without CUDA before they reach `Dispatch`."""

    def __init__(self, device: "FakeCuda") -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if kwargs.pop("pin_memory", False):
            return pinned(func(*args, **kwargs))
        is_there = bool(args) and isinstance(args[0], CudaTensor)
        if func is Tensor.pin_memory:
            return args[0] if is_pinned(args[0]) else pinned(args[0].clone())
        if func in UNGUARDED:
            return UNGUARDED[func](*args, **kwargs)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if is_there and name in ("data_ptr", "tolist", "numpy"):
            if name != "data_ptr":
                self._device.waits_for(name)
            return func(args[0].inner)
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], known(args[1]), *args[2:])
            if is_there:
                return self._get(*args) if name == "__getitem__" else self._set(*args)
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
        """Apply integers, slices and new dimensions to x. Returns the view and the tensor indices by dimension."""
        items = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [item for item in items if not isinstance(item, Tensor)]:
            at = next(i for i, item in enumerate(items) if item is Ellipsis)
            missing = x.dim() - sum(not (item is None or isinstance(item, bool)) for item in items) + 1
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
            elif isinstance(item, bool):
                x = x.unsqueeze(dim)
                indices += [None] * (dim - len(indices)) + [CudaTensor(torch.zeros(int(item), dtype=torch.int64))]
                dim += 1
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


def known(item: Any) -> Any:
    """The index with slice bounds, and 0-dim integers and bools, read as Python numbers, as torch does first."""
    if isinstance(item, tuple):
        return tuple(map(known, item))
    if isinstance(item, slice):
        bounds = (item.start, item.stop, item.step)
        return slice(*(x.item() if isinstance(x, Tensor) else x for x in bounds))
    if isinstance(item, Tensor) and not item.dim() and not item.dtype.is_floating_point:
        return bool(item.item()) if item.dtype in (torch.bool, torch.uint8) else item.item()
    return item
