"""Weights in the layout of kernels.cpp, in the smallest format that is asked for or that loses nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignment_core.cpu.native import Matrix

Format = Literal["float32", "bfloat16", "int8", "int4"]
Quantization = Literal["auto", "none", "int8", "int4"]

FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8", "int4")  # as numbered in kernels.cpp
LANES = 16
BITS = {"bfloat16": 16, "int8": 8, "int4": 4}
TILE = 64  # output columns are padded to whole tiles
WORD = 8
GROUP = 32


@dataclass(frozen=True, slots=True)
class Codes:
    """Weights as scale × code + offset, one scale and offset a group of 32.

    codes: [N, K / 32, 32] float32 integers. scale, offset: [N, K / 32] float32, of float16 precision.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def weights(self) -> Tensor:
        return (self.codes * self.scale[..., None] + self.offset[..., None]).flatten(1)


def packable(weights: Tensor) -> bool:
    return weights.shape[1] % WORD == 0


def pack(weights: Tensor, bias: Tensor | None, quantization: Quantization) -> "PackedMatrix":
    """Pack [N, K] weights.

    auto: the smallest format whose weights are equal to these; so a GGUF of 4 or 8 bits, read as
    float32, goes back to its own blocks, and bfloat16 weights stay 16 bits wide. none: float32.
    int8, int4: rounded, in groups of 32; a K that is no multiple of 32 stays lossless.
    """
    weights = weights.detach().float()
    grouped = weights.shape[1] % GROUP == 0
    if quantization == "none":
        return PackedMatrix(weights, bias, "float32")
    if quantization in ("int8", "int4") and grouped:
        codes = _int8(weights) if quantization == "int8" else _int4(weights)
        return PackedMatrix(codes, bias, quantization)
    candidates: tuple[tuple[Format, Callable[[Tensor], Codes]], ...]
    candidates = (("int4", _int4), ("int4", _int4_symmetric), ("int8", _int8)) if grouped else ()
    for format, quantize in candidates:
        if torch.equal(quantize(weights[:LANES]).weights(), weights[:LANES]):  # most are out at once
            codes = quantize(weights)
            if torch.equal(codes.weights(), weights):
                return PackedMatrix(codes, bias, format)
    lossless = torch.equal(weights.bfloat16().float(), weights)
    return PackedMatrix(weights, bias, "bfloat16" if lossless else "float32")


class PackedMatrix:
    """A linear layer's weights and bias, ready for kernels.cpp; `matrix` is what the kernels take."""

    def __init__(self, weights: Tensor | Codes, bias: Tensor | None, format: Format) -> None:
        self.format = format
        self.shape = tuple((weights.codes.flatten(1) if isinstance(weights, Codes) else weights).shape)
        self._scale = self._offset = None
        if isinstance(weights, Codes):
            self._data = _words(_panels(weights.codes.flatten(1)).to(torch.int32), BITS[format])
            self._scale = _panels(weights.scale)
            self._offset = _panels(weights.offset) if format == "int4" else None
        elif format == "bfloat16":
            self._data = _words(_panels(weights).view(torch.int32) >> 16, 16)
        else:
            self._data = _panels(weights)
        self._bias = None if bias is None else bias.detach().float().contiguous()
        tensors = (self._data, self._scale, self._offset, self._bias)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.matrix = Matrix(FORMATS.index(format), *self.shape, *pointers)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _panels(x: Tensor) -> Tensor:
    """[N, K] to [N / 16, K, 16], N padded to whole tiles."""
    x = pad(x, (0, 0, 0, -len(x) % TILE))
    return x.view(-1, LANES, x.shape[1]).transpose(1, 2).contiguous()


def _words(codes: Tensor, bits: int) -> Tensor:
    """[panels, K, 16] int32 to [panels, K × bits / 32, 16]: several k in a word, the lowest in the lowest bits."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], codes.shape[1] // per_word, LANES, dtype=torch.int32)
    for i in range(per_word):
        words |= (codes[:, i::per_word] & ((1 << bits) - 1)) << (bits * i)
    return words


def _int4(weights: Tensor) -> Codes:
    """From the least to the greatest of each group in 15 steps: what GGUF calls Q4_1."""
    groups = _groups(weights)
    low, high = groups.amin(-1), groups.amax(-1)
    scale, offset = _half((high - low) / 15), _half(low)
    return Codes(_round(groups - offset[..., None], scale, 0, 15), scale, offset)


def _int4_symmetric(weights: Tensor) -> Codes:
    """The number of largest magnitude is −8 steps from zero: GGUF's Q4_0."""
    groups = _groups(weights)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = _half(largest / -8)
    offset = scale * -8
    return Codes(_round(groups - offset[..., None], scale, 0, 15), scale, offset)


def _int8(weights: Tensor) -> Codes:
    """The largest magnitude is 127 steps from zero: GGUF's Q8_0."""
    groups = _groups(weights)
    scale = _half(groups.abs().amax(-1) / 127)
    return Codes(_round(groups, scale, -127, 127), scale, torch.zeros_like(scale))


def _groups(weights: Tensor) -> Tensor:
    return weights.view(len(weights), -1, GROUP)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _round(x: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    safe = torch.where(scale == 0, 1.0, scale)[..., None]
    return (x / safe).round_().clamp_(least, most)
