"""Models and tokenizers as transformers reads them: directories, hub ids, GGUF files."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from linalign.alignment_core.errors import LoadingError
from linalign.alignment_core.loading import checkpoint

OF_MODELS = ("distributed_config", "device_map")  # options of from_pretrained for models, not for tokenizers


def from_pretrained(
    name: str, dtype: torch.dtype | str, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a directory or a hub id. options: Those of AutoModelForCausalLM.from_pretrained. Raises LoadingError."""
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
        raise LoadingError(f"{options.get('gguf_file', name)} can't be loaded: {one_line(error)}") from error
    if info["missing_keys"]:
        raise LoadingError(
            f"{name} lacks weights of a {type(model).__name__}: {', '.join(sorted(info['missing_keys']))}"
        )
    return model, tokenizer


def from_gguf(path: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file as plain weights.

    transformers marks such a model as quantised, so that it can't be changed. The weights are copied to a new model.
    """
    checkpoint.refuse_lying_tensors(path)
    with _quiet_unless_on_a_terminal():
        model, tokenizer = from_pretrained(str(path.parent), dtype, {"gguf_file": path.name})
    config = model.config
    del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain, tokenizer


def _refuse(name: str, config: PreTrainedConfig) -> None:
    """Raises LoadingError in one line for what transformers would report in many lines, or one after the other."""
    checkpoint.refuse_missing_packages(name, config.to_dict())
    is_known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not is_known and not hasattr(config, "auto_map"):  # a checkpoint with its own code
        raise LoadingError(f"{name} is of the type {config.model_type}, which is not a text-only language model")


def one_line(error: Exception) -> str:
    """An error's message, in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _quiet_unless_on_a_terminal() -> contextlib.AbstractContextManager[object]:
    # transformers' GGUF reader always draws its progress bar.
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
