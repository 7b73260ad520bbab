"""Packs weights into the layout of kernels.cpp, in the requested format or in the smallest lossless one."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from linalign.alignment_core.cpu.kernels import Matrix, library

Format = Literal["float32", "bfloat16", "int8", "int4"]
Quantization = Literal["auto", "none", "int8", "int4"]

FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8", "int4")  # as numbered in kernels.cpp
LANES = 16  # output columns of a panel
TILE = 64  # the number of output columns is padded to a multiple of this
WORD = 8  # most weights in a 32-bit word
GROUP = 32  # weights that share a scale and an offset


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a quantised weight can have: scale × code + offset, min_code ≤ code ≤ max_code."""

    format: Literal["int8", "int4"]
    min_code: int  # smallest code
    max_code: int  # largest code
    scale: Tensor  # [N, K / 32] float32, of float16 precision: one for each group of 32 weights
    offset: Tensor  # as scale


def packable(weights: Tensor) -> bool:
    """Whether the kernels support a matrix of this shape, [N, K]."""
    return weights.shape[1] % WORD == 0


def pack(weights: Tensor, bias: Tensor | None, quantization: Quantization) -> "PackedMatrix":
    """Pack [N, K] weights and their bias, [N] or None.

    quantization: The format.
        auto: The smallest lossless format. So the weights of a GGUF of 4 or 8 bits, read as float32, get their
            original codes back, and bfloat16 weights keep 16 bits.
        none: float32.
        int8, int4: Rounded, in groups of 32. If K is no multiple of 32: float32 or bfloat16, lossless.
    """
    weights = weights.detach().float().contiguous()
    if quantization == "none":
        return PackedMatrix.of_floats(weights, bias, "float32")
    if weights.shape[1] % GROUP == 0:
        if quantization in ("int8", "int4"):
            packed, _ = PackedMatrix.on_grid(
                weights, bias, _int8(weights) if quantization == "int8" else _int4(weights)
            )
            return packed
        for grid_of in (_int4, _int4_symmetric, _int8):
            _, lossless = PackedMatrix.on_grid(weights[:LANES], None, grid_of(weights[:LANES]))
            if lossless:  # a few rows rule out most grids quickly
                packed, lossless = PackedMatrix.on_grid(weights, bias, grid_of(weights))
                if lossless:
                    return packed
    lossless = torch.equal(weights.bfloat16().float(), weights)
    return PackedMatrix.of_floats(weights, bias, "bfloat16" if lossless else "float32")


class PackedMatrix:
    """A linear layer's weights and bias in the layout of kernels.cpp. `matrix`: the C struct over `tensors`."""

    def __init__(
        self,
        format: Format,
        shape: torch.Size,
        data: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self.format = format
        self.shape = shape
        self.tensors = (data, scale, offset, None if bias is None else bias.detach().float().contiguous())
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in self.tensors]
        self.matrix = Matrix(FORMATS.index(format), *shape, *pointers)
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors if tensor is not None)

    @classmethod
    def of_floats(cls, weights: Tensor, bias: Tensor | None, format: Literal["float32", "bfloat16"]) -> "PackedMatrix":
        data = _panels(weights)
        if format == "bfloat16":  # two in a word, the one of lower k in the lower half
            bits = data.view(torch.int32)
            data = (bits[:, 0::2] >> 16 & 0xFFFF) | (bits[:, 1::2] & ~0xFFFF)
        return cls(format, weights.shape, data, None, None, bias)

    @classmethod
    def on_grid(cls, weights: Tensor, bias: Tensor | None, grid: Grid) -> tuple["PackedMatrix", bool]:
        """Round each weight to the nearest number of the grid. Returns the matrix, and whether that was lossless."""
        lib = library()
        assert lib is not None
        bits = 8 if grid.format == "int8" else 4
        num_panels = -(-len(weights) // TILE) * TILE // LANES
        words = torch.zeros(num_panels, weights.shape[1] * bits // 32, LANES, dtype=torch.int32)
        lossless = lib.linalign_encode(
            weights.data_ptr(),
            *weights.shape,
            grid.scale.data_ptr(),
            grid.offset.data_ptr(),
            grid.min_code,
            grid.max_code,
            bits,
            words.data_ptr(),
            torch.get_num_threads(),
        )
        offset = _panels(grid.offset) if grid.format == "int4" else None
        return cls(grid.format, weights.shape, words, _panels(grid.scale), offset, bias), bool(lossless)


def _panels(x: Tensor) -> Tensor:
    """[N, K] to [N / 16, K, 16], with N padded to a multiple of TILE."""
    padding = -len(x) % TILE
    x = pad(x, (0, 0, 0, padding)) if padding else x
    return x.view(-1, LANES, x.shape[1]).transpose(1, 2).contiguous()


def _int4(weights: Tensor) -> Grid:
    """15 steps from the least to the greatest number of each group: GGUF's Q4_1."""
    low, high = _groups(weights).aminmax(dim=-1)
    return Grid("int4", 0, 15, _half((high - low) / 15), _half(low))


def _int4_symmetric(weights: Tensor) -> Grid:
    """The number of largest magnitude is −8 steps from zero: GGUF's Q4_0."""
    low, high = _groups(weights).aminmax(dim=-1)
    scale = _half(torch.where(-low > high, low, high) / -8)
    return Grid("int4", 0, 15, scale, scale * -8)


def _int8(weights: Tensor) -> Grid:
    """The largest magnitude is 127 steps from zero: GGUF's Q8_0."""
    low, high = _groups(weights).aminmax(dim=-1)
    scale = _half(torch.maximum(-low, high) / 127)
    return Grid("int8", -127, 127, scale, torch.zeros_like(scale))


def _groups(weights: Tensor) -> Tensor:
    return weights.view(len(weights), -1, GROUP)


def _half(x: Tensor) -> Tensor:
    """Rounded to float16 precision."""
    return x.half().float()
