"""Copies between the host and the device that the host does not wait for."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(values: "np.ndarray[Any, Any] | Tensor", device: torch.device) -> Tensor:
    """values: on the host. On CUDA through pinned memory, as a copy from other memory waits for the device."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; on CUDA its values are valid after the stream has reached this point."""
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
