"""What a model's configuration says about how it runs."""

from typing import Any

from transformers import PreTrainedModel

SERVED_LAYERS = {"full_attention", "sliding_attention"}


def text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def unserved_layers(model: PreTrainedModel) -> list[str]:
    """The kinds of layers that the engine can't run."""
    return sorted(set(getattr(text_config(model), "layer_types", None) or ()) - SERVED_LAYERS)


def heads_and_dim(model: PreTrainedModel) -> tuple[int, int]:
    """The number of key heads of the whole model, and the size of each. Raises ValueError where layers differ."""
    config = text_config(model)
    try:
        num_kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return num_kv_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except RuntimeError as error:
        message = f"{type(model).__name__} has layers whose keys are of different sizes, which can't be served yet"
        raise ValueError(message) from error


def local_heads_and_dim(model: PreTrainedModel) -> tuple[int, int]:
    """`heads_and_dim` of this process's part of the model."""
    num_kv_heads, head_dim = heads_and_dim(model)
    return num_kv_heads // (getattr(model, "_tp_size", None) or 1), head_dim


def scales_by_length(model: PreTrainedModel) -> bool:
    """Whether transformers computes the rotary embedding by the longest sequence of a batch."""
    rope = getattr(text_config(model), "rope_parameters", None) or {}
    return rope.get("rope_type") in ("dynamic", "longrope")


def has_outliers(model: PreTrainedModel) -> bool:
    """Whether bitsandbytes looks for outliers in the activations of each step (LLM.int8)."""
    return bool(getattr(model, "is_loaded_in_8bit", False))
