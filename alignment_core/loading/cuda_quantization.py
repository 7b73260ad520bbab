"""Weights of fewer bits on a GPU, by torchao (the optional extra `cuda`)."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


class QuantizationError(ValueError):
    """torchao is not there, or can't do that here."""


def quantise(model: PreTrainedModel, quantization: str) -> None:
    """Round the weights of the linear layers in place, except the output layer's.

    quantization: fp8 (a scale per row; activations too, rounded as they come), int8 (a scale per row;
    activations as they are), int4 (a scale and an offset per 128; the same). Raises QuantizationError.
    """
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise QuantizationError(f"{quantization} on a GPU needs torchao: pip install 'linalign[cuda]'") from error
    output = model.get_output_embeddings()

    def concerned(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and module is not output

    try:
        quantize_(model, _config(quantization), filter_fn=concerned)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        raise QuantizationError(f"torchao can't quantise to {quantization} here: {error}") from error


def _config(quantization: str) -> Any:
    from torchao import quantization as torchao

    match quantization:
        case "fp8":
            return torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
        case "int8":
            return torchao.Int8WeightOnlyConfig()
        case "int4":  # the layout of the kernels that come with torch
            return torchao.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    raise ValueError(quantization)
