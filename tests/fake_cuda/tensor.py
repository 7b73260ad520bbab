"""Tensors of the fake device, and helpers to inspect the operands of an operation."""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from tests.fake_cuda.memory import Allocator, Block, Fault

CUDA = torch.device("cuda", 0)
HOST = torch.device("cpu")
OURS = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)


class CudaTensor(torch.Tensor):
    """A tensor on the fake device. inner: Its values, on the CPU. block: Its memory."""

    inner: Tensor
    block: Block
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "CudaTensor":
        shape = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        wrapped = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=CUDA, **shape)
        wrapped.inner, wrapped.block = inner, Allocator.current.block_of(inner)
        return wrapped

    def __repr__(self) -> str:
        return f"CudaTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: object) -> Any:
        raise Fault(f"{func} without the device")


def inner_of(x: Any) -> Any:
    return x.inner if isinstance(x, CudaTensor) else x


def leaves(args: Iterable[Any]) -> Iterator[Any]:
    """The arguments of an operation, with nested lists and tuples flattened."""
    for x in args:
        if isinstance(x, list | tuple):
            yield from leaves(x)
        else:
            yield x


def converted(convert: Callable[[Tensor], Tensor], x: Any) -> Any:
    """A copy of x with each tensor converted, also in nested lists and tuples."""
    if isinstance(x, Tensor):
        return convert(x)
    return type(x)(converted(convert, part) for part in x) if isinstance(x, list | tuple) else x


def pinned(x: Tensor) -> Tensor:
    x.untyped_storage().is_fake_pinned = True  # on the storage, so that all views share it
    return x


def is_pinned(x: Tensor) -> bool:
    return getattr(x.untyped_storage(), "is_fake_pinned", False)


def caller() -> FrameType:
    """The frame that called the operation: the innermost one outside torch and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not (name.startswith((TORCH, OURS, "<")) or name.endswith("/contextlib.py")):
            return frame
        frame = frame.f_back
    raise AssertionError("no caller")


def place() -> str:
    frame = caller()
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
