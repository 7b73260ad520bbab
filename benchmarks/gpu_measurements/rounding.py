"""Naive versions of torchao's weight rounding, for the oracle."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUP = 128  # weights that share a scale and an offset in int4


def rounded(judge: nn.Module, output: nn.Module, quantization: str) -> nn.Module:
    """A copy of the model with bfloat16 weights whose linear layers are rounded to `quantization`.

    output: The output layer, which is not rounded. In fp8, the inputs of linear layers are rounded too.
    """
    rounding: Callable[[Tensor], Tensor] = {"fp8": to_fp8, "int8": to_int8, "int4": to_int4}[quantization]
    names = {name for name, module in judge.named_modules() if isinstance(module, nn.Linear) and module is not output}
    judge = copy.deepcopy(judge)
    for name, module in judge.named_modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        if name in names:
            module.weight.data = rounding(module.weight.data)
            if quantization == "fp8":
                module.register_forward_pre_hook(lambda _, inputs: (to_fp8(inputs[0]),))
    return judge


def to_fp8(x: Tensor) -> Tensor:
    """[rows, n] of bfloat16 values, rounded to e4m3 (at most 448) with one scale per row."""
    scale = (x.bfloat16().abs().amax(-1, keepdim=True) / 448).float()
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale


def to_int8(weight: Tensor) -> Tensor:
    """[rows, n] of bfloat16 values, rounded to integers with one scale per row."""
    scale = (weight.bfloat16().abs().amax(-1, keepdim=True) / 127.5).float()
    return (weight.float() * (1 / scale)).round().clamp(-128, 127).to(weight.dtype) * scale


def to_int4(weight: Tensor) -> Tensor:
    """[rows, n] of bfloat16 values, rounded to 0…15 with a scale and an offset per GROUP, computed in bfloat16."""
    groups = weight.bfloat16().unflatten(-1, (-1, GROUP))
    least, most = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (most - least) / 15
    middle = least + scale * 8
    numbers = ((groups - (middle - scale * 8)) / scale).round().clamp(0, 15).to(weight.dtype)
    return ((numbers - 8) * scale + middle).flatten(-2)
