"""Loads a model by its name: a directory, a hub id, a GGUF file, or the embedded default.

Only safetensors and GGUF are read. A checkpoint is never unpickled.
"""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from linalign.alignment_core.cpu.kernels import library
from linalign.alignment_core.cpu.layers import num_fused_layers, replace_layers
from linalign.alignment_core.errors import LoadingError
from linalign.alignment_core.execution.architecture import heads_and_dim, scales_by_length
from linalign.alignment_core.execution.followers import Followers, is_follower, start_followers
from linalign.alignment_core.loading import cuda_quantization, preflight
from linalign.alignment_core.loading.checkpoint import EMBEDDED_ID
from linalign.alignment_core.loading.eager_check import compare_with_eager
from linalign.alignment_core.loading.embedded import load_embedded
from linalign.alignment_core.loading.pretrained import from_gguf, from_pretrained, one_line

log = logging.getLogger(__name__)

Quantization = Literal["auto", "none", "int8", "int4", "fp8"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer."""

    id: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int  # longest context, in tokens, that the model's positions are made for
    eos_token_ids: frozenset[int]  # every id that ends a reply; models have several
    followers: Followers | None = None  # the other processes of a tensor-parallel model


def load(
    name: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: Quantization = "auto",
    trust_remote_code: bool = False,
    tensor_parallel_size: int = 1,
) -> LoadedModel:
    """Load a model for inference.

    name: a local directory, a .gguf file, a Hugging Face id, or None for the embedded SmolLM2-135M.
    device: auto (CUDA where there is one), cpu, cuda, cuda:N.
    dtype: auto (float32 on a CPU, the checkpoint's own elsewhere), float32, bfloat16, float16.
    quantization: how the weights of linear layers are held. On a CPU see `cpu.packing.pack`; on a GPU fp8,
    int8 and int4 are torchao's (`cuda_quantization`), and auto and none leave them as they are.
    tensor_parallel_size: processes that hold a part of every layer each, on a GPU each if there are any;
    all but this one are started here.
    Raises LoadingError.
    """
    has_cuda = torch.cuda.is_available()
    preflight.check(
        name,
        device=device,
        quantization=quantization,
        tensor_parallel_size=tensor_parallel_size,
        has_cuda=has_cuda,
    )
    where = _device(device, has_cuda)
    torch_dtype: torch.dtype | str = "auto" if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and where.type == "cpu":
        torch_dtype = torch.float32
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if where.type != "cpu" and tensor_parallel_size == 1:
        options["device_map"] = where  # straight to the GPU
    followers = None
    if tensor_parallel_size > 1:
        options["distributed_config"] = DistributedConfig(tp_size=tensor_parallel_size)
        if not is_follower():
            arguments = {
                "name": name,
                "device": device,
                "dtype": dtype,
                "quantization": quantization,
                "trust_remote_code": trust_remote_code,
                "tensor_parallel_size": tensor_parallel_size,
            }
            followers = start_followers(tensor_parallel_size, arguments)
    started = time.perf_counter()
    _show_progress_on_terminals_only()
    try:
        as_packed = quantization == "auto" and torch_dtype == torch.float32 and where.type == "cpu"
        id, model, tokenizer = _read(name, torch_dtype, options, as_packed and tensor_parallel_size == 1)
        _check(id, model, tokenizer)
        if not _is_quantised(model):
            model = model.to(where)
        model.eval()
        if not num_fused_layers(model):  # a packed copy was compared when it was made
            _compare(id, model)
        if tensor_parallel_size == 1:
            _prepare_layers(model, quantization)
    except BaseException:
        if followers is not None:
            followers.kill()
        raise
    log.info("Loaded %s in %.1f s: %s on %s", id, time.perf_counter() - started, model.dtype, where)
    return LoadedModel(id, model, tokenizer, _max_model_len(model), _eos_token_ids(model, tokenizer), followers)


def _device(name: str, has_cuda: bool) -> torch.device:
    """The device, which becomes the current one if it is a numbered GPU. Raises LoadingError."""
    device = torch.device(("cuda" if has_cuda else "cpu") if name == "auto" else name)
    if device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise LoadingError(f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)  # graphs, streams and Triton use the current one
    return device


def _prepare_layers(model: PreTrainedModel, quantization: Quantization) -> None:
    """Replace weights, or whole layers, by the requested format, or by the fastest lossless one of the device."""
    if _is_quantised(model):
        if quantization in preflight.ROUNDED:
            raise LoadingError(f"the checkpoint is quantised already: quantization can't be {quantization}")
    elif model.device.type == "cpu":
        assert quantization != "fp8"
        if library() is not None and not num_fused_layers(model):
            replace_layers(model.float(), quantization)  # bfloat16 weights stay 16 bits wide; the arithmetic is float32
    elif quantization in preflight.ROUNDED:
        try:
            cuda_quantization.quantise(model, quantization)
        except cuda_quantization.QuantizationError as error:
            raise LoadingError(str(error)) from error


def _is_quantised(model: PreTrainedModel) -> bool:
    """Whether transformers has loaded the model with a quantiser, such as bitsandbytes."""
    return bool(getattr(model, "is_quantized", False))


def _read(
    name: str | None, dtype: torch.dtype | str, options: dict[str, Any], as_packed: bool
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
    """The id, the model and its tokenizer. as_packed: Whether layers may come packed without loss from the cache."""
    if name is None or name == EMBEDDED_ID:
        return EMBEDDED_ID, *load_embedded(dtype, options, as_packed)
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        log.info("Reading %s", path.name)
        return path.stem, *from_gguf(path, dtype)
    id = Path(name).resolve().name if Path(name).is_dir() else name
    log.info("Loading %s", id)
    return id, *from_pretrained(name, dtype, options)


def _check(id: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise LoadingError(f"{id} has no fast tokenizer (tokenizer.json)")
    parts: int = getattr(model, "_tp_size", None) or 1
    config = model.config.get_text_config()
    try:
        heads, _ = heads_and_dim(model)
    except ValueError as error:
        raise LoadingError(f"{id} can't be served: {error}") from error
    if heads % parts:
        raise LoadingError(f"{id} has {heads} key heads, which {parts} processes can't share evenly")
    foreign = [token for token, number in tokenizer.get_vocab().items() if number >= config.vocab_size]
    if foreign:
        log.warning(
            "%s: the model has no embedding for %d tokens of its tokenizer, such as %r; prompts with them are refused",
            id,
            len(foreign),
            foreign[0],
        )


def _compare(id: str, model: PreTrainedModel) -> None:
    """Raises LoadingError if the engine computes other logits than transformers."""
    try:
        compare_with_eager(model)
    except Exception as error:  # of any model's code
        raise LoadingError(
            f"{id} can't be served: {error if type(error) is ValueError else one_line(error)}"
        ) from error


def _show_progress_on_terminals_only() -> None:
    if sys.stderr.isatty():
        transformers.utils.logging.enable_progress_bar()
    else:
        transformers.utils.logging.disable_progress_bar()


def _max_model_len(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    length: int = config.max_position_embeddings
    if scales_by_length(model):
        # The embedding depends on the longest sequence of a batch: beyond this length a reply would depend on others.
        original = config.rope_parameters.get("original_max_position_embeddings")
        length = min(length, original or getattr(config, "original_max_position_embeddings", None) or length)
    return length


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for found in (getattr(generation, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            ids.add(found)
        elif found is not None:
            ids.update(found)
    return frozenset(ids)
