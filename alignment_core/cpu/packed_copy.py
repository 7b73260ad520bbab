"""Saves and loads a packed model whose layers are all fused, so that loading packs nothing.

The safetensors file has every packed matrix, parameter and buffer by name. Its metadata has, as JSON, the format and
shape of each matrix and the parameters of each layer. A file is valid for one version of the weight layout: `layout`.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from linalign.alignment_core.attention.paged_batch import LayerAttention
from linalign.alignment_core.cpu import layers, packing
from linalign.alignment_core.cpu.kernels import SOURCE, Shape
from linalign.alignment_core.cpu.layers import FusedLayer, FusedLayers, PackedLinear
from linalign.alignment_core.cpu.packing import PackedMatrix

DTYPES = {"F32": torch.float32, "I32": torch.int32}
LINE = 64  # bytes of a cache line
PARTS = ("data", "scale", "offset", "bias")  # of a packed matrix


def layout() -> str:
    """A version of the weight layout: a hash of all code that decides how weights are laid out in memory."""
    files = [SOURCE, *(Path(str(module.__file__)) for module in (layers, packing)), Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def save(model: PreTrainedModel, file: Path) -> None:
    """Write a packed model to a file. Raises ValueError if a layer is not fused, and OSError."""
    base: Any = model.base_model
    if len(base.layers) != 1 or not isinstance(base.layers[0], FusedLayers):
        raise ValueError(f"not every layer of {type(model).__name__} runs fused")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {"layers": [], "linears": {}}
    for member in base.layers[0].members:
        name = f"layers.{member.index}"
        matrices = [_save_matrix(f"{name}.{i}", matrix, tensors) for i, matrix in enumerate(member.matrices)]
        for i, norm in enumerate(member.norms):
            if norm is not None:
                tensors[f"{name}.norm.{i}"] = norm
        attention = {field: getattr(member.layer_attention, field) for field in ("scaling", "window", "softcap")}
        shape = {field: getattr(member.shape, field) for field, _ in Shape._fields_}
        metadata["layers"].append({"attention": attention, "shape": shape, "matrices": matrices})
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            metadata["linears"][name] = _save_matrix(name, module.packed, tensors)
    tensors |= dict(_own_tensors(model))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"metadata": json.dumps(metadata)})


def load(model: PreTrainedModel, file: Path) -> None:
    """Load a saved model's weights and layers.

    model: Of the same architecture; may be on the meta device.

    Raises exceptions of any kind if the file is damaged.
    """
    metadata, tensors = _read(file)
    members = []
    for index, layer in enumerate(metadata["layers"]):
        name = f"layers.{index}"
        matrices = [_load_matrix(f"{name}.{i}", matrix, tensors) for i, matrix in enumerate(layer["matrices"])]
        norms = [tensors.get(f"{name}.norm.{i}") for i in range(4)]
        members.append(
            FusedLayer(index, LayerAttention(**layer["attention"]), matrices, norms, Shape(**layer["shape"]))
        )
    base: Any = model.base_model
    base.layers = nn.ModuleList([FusedLayers(members)])
    for name, matrix in metadata["linears"].items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, PackedLinear(_load_matrix(name, matrix, tensors)))
    for name, _ in list(_own_tensors(model)):
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(tensors[name], requires_grad=False)
        else:
            module._buffers[last] = tensors[name]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the metadata and the tensors. Raises ValueError if the file is truncated.

    All tensors lie in one block of memory that is aligned to a cache line, for faster kernels. Mapping the file and
    copying its pages one by one would take a second.
    """
    with file.open("rb") as stored:
        (length,) = struct.unpack("<Q", stored.read(8))
        header = json.loads(stored.read(length))
        size = file.stat().st_size - stored.tell()
        buffer = np.empty(size + LINE, np.uint8)
        data = buffer[-buffer.ctypes.data % LINE :][:size]
        if stored.readinto(data.data) != size:
            raise ValueError(f"{file.name} is truncated")
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = torch.from_numpy(data[begin:end]).view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return json.loads(header["__metadata__"]["metadata"]), tensors


def _own_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors that torch holds: parameters and buffers, those included that a checkpoint does not have."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _save_matrix(name: str, packed: PackedMatrix, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors |= {f"{name}.{part}": x for part, x in zip(PARTS, packed.tensors, strict=True) if x is not None}
    return {"format": packed.format, "shape": list(packed.shape)}


def _load_matrix(name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> PackedMatrix:
    parts = [tensors.get(f"{name}.{part}") for part in PARTS]
    assert parts[0] is not None
    return PackedMatrix(entry["format"], torch.Size(entry["shape"]), parts[0], *parts[1:])
