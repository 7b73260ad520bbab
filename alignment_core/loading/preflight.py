"""Early checks: settings that can't work are refused within a second, before torch is imported or a model is read.

Only certain failures are refused here. The engine checks what depends on the loaded model.
"""

import ctypes
import importlib.metadata
import sys

from linalign.alignment_core.errors import LoadingError
from linalign.alignment_core.loading.checkpoint import EMBEDDED_ID, look_at

ROUNDED = ("int8", "int4", "fp8")


def check(
    name: str | None,
    *,
    device: str,
    quantization: str,
    tensor_parallel_size: int,
    has_cuda: bool,
    max_model_len: int | None = None,
    kv_cache_dtype: str = "auto",
) -> None:
    """Raises LoadingError for unsupported arguments of `load` and `Engine`. has_cuda: Whether there may be a GPU."""
    on_gpu, size = has_cuda and device != "cpu", tensor_parallel_size
    if size > 1 and (name or "").endswith(".gguf"):
        raise LoadingError("a GGUF file can't be split: tensor_parallel_size must be 1")
    if size > 1 and ":" in device:
        raise LoadingError(f"{size} processes need one GPU each: device must be cuda, not {device}")
    if device.startswith("cuda") and not has_cuda:
        raise LoadingError(f"there is no CUDA device for --device {device}")
    if size > 1 and quantization in ROUNDED:
        raise LoadingError(f"a tensor-parallel model can't be quantised: {quantization}")
    if quantization == "fp8" and not on_gpu:
        raise LoadingError("quantization fp8 is for GPUs; a CPU has int8 and int4")
    if kv_cache_dtype not in ("auto", "float32") and not on_gpu:
        raise LoadingError(f"the KV cache of a CPU is float32, not {kv_cache_dtype}")
    model = look_at(name)
    if max_model_len and model.max_model_len and max_model_len > model.max_model_len:
        raise LoadingError(f"max_model_len is {max_model_len}, but the model's context is {model.max_model_len}")
    if model.num_kv_heads and model.num_kv_heads % size:
        raise LoadingError(
            f"{name or EMBEDDED_ID} has {model.num_kv_heads} key heads, which {size} processes can't share evenly"
        )


def may_have_cuda() -> bool:
    """False only if torch can't find a GPU: it is built for CPUs, or it is built for CUDA and there is no driver."""
    try:
        build = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return True
    kind = build.partition("+")[2]  # empty in PyPI's builds, which are for CUDA on Linux
    if kind == "cpu" or sys.platform == "darwin":
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return sys.platform != "linux" or not (kind == "" or kind.startswith("cu"))
    return True
