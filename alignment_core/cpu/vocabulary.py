"""Operations on the logits of a whole vocabulary by kernels.cpp, in one pass where torch needs several."""

import ctypes

import torch
from torch import Tensor

from linalign.alignment_core.cpu.kernels import library

CAPACITY = 1024  # candidates of a line for which `narrow` allocates at first


def has_kernels(y: Tensor) -> bool:
    """Whether the functions of this file can run on `y`."""
    return y.device.type == "cpu" and library() is not None


def log_totals(y: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """As `alignment.log_totals`, for float32 on a CPU."""
    y, temperature = y.contiguous(), temperature.contiguous()
    best, totals = y.new_empty(len(y)), y.new_empty(len(y))
    _library().linalign_log_totals(
        y.data_ptr(),
        *y.shape,
        temperature.data_ptr(),
        best.data_ptr(),
        totals.data_ptr(),
        torch.get_num_threads(),
    )
    return best, totals


def narrow(y: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """As `candidates.narrow`, for float32 on a CPU. At least one bound must be above −inf."""
    y, bounds = y.contiguous(), bounds.contiguous()
    capacity = CAPACITY
    while True:
        tokens = torch.empty(len(y), capacity, dtype=torch.int64)
        candidates = y.new_empty(tokens.shape)
        counts = torch.empty(len(y), dtype=torch.int64)
        _library().linalign_narrow(
            y.data_ptr(),
            *y.shape,
            bounds.data_ptr(),
            tokens.data_ptr(),
            candidates.data_ptr(),
            capacity,
            counts.data_ptr(),
            torch.get_num_threads(),
        )
        max_count = int(counts.max())
        if max_count <= capacity:
            return tokens[:, :max_count], candidates[:, :max_count]
        capacity = max_count


def _library() -> ctypes.CDLL:
    lib = library()
    assert lib is not None
    return lib
