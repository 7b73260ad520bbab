"""Replaces the layers of a transformers model by our kernels where these compute the same.

A decoder layer is fused into one kernel call if it has the parts of a Llama layer, and its output for random input is
the same as that of the kernel. So there is no list of architectures. Any other layer keeps its own code; only its
linear layers are packed.
"""

import ctypes
import logging
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linalign.alignment_core.attention.paged_batch import LayerAttention, PagedBatch, Plan
from linalign.alignment_core.attention.probe import probe
from linalign.alignment_core.cpu import attention as cpu_attention
from linalign.alignment_core.cpu.kernels import Layer, Shape, library
from linalign.alignment_core.cpu.packing import PackedMatrix, Quantization, pack, packable
from linalign.alignment_core.scheduling.sequence import Branch
from linalign.alignment_core.scheduling.step import Row

log = logging.getLogger(__name__)

LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
PROBE_TOKENS = 5
TOLERANCE = 1e-4  # of the largest number; the error of float32 sums in another order is a hundred times smaller


class PackedLinear(nn.Module):
    """y = x · wᵀ + b over packed weights, float32."""

    def __init__(self, packed: PackedMatrix) -> None:
        super().__init__()
        self.packed = packed
        self.matrices = [packed]

    @cached_property
    def weight(self) -> Tensor:
        """[N, K] float32, for models whose own code reads it. Unpacked by a product with the identity."""
        plain = PackedMatrix(self.packed.format, self.packed.shape, *self.packed.tensors[:3], bias=None)
        weight: Tensor = PackedLinear(plain)(torch.eye(self.packed.shape[1])).T
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[…, K] to […, N]."""
        lib = library()
        assert lib is not None
        x = x.contiguous()
        num_rows = x.numel() // x.shape[-1]
        y = x.new_empty(*x.shape[:-1], self.packed.shape[0])
        lib.linalign_linear(
            ctypes.byref(self.packed.matrix), x.data_ptr(), num_rows, y.data_ptr(), torch.get_num_threads()
        )
        return y


class FusedLayer:
    """A decoder layer in the form that the kernels take."""

    def __init__(
        self,
        index: int,
        layer_attention: LayerAttention,
        matrices: list[PackedMatrix],
        norms: list[Tensor | None],
        shape: Shape,
    ) -> None:
        """
        index: Layer number.
        layer_attention: Its window, scale and soft cap.
        matrices: Four: query, key and value together; output; gate and up together; down.
        norms: Weights of four norms: before attention, before the MLP, of queries, of keys. None if the layer has no
            such norm.
        """
        self.index, self.layer_attention, self.matrices, self.norms = index, layer_attention, matrices, norms
        self.shape = shape
        pointers = [norm if norm is None else norm.data_ptr() for norm in norms]
        self.layer = Layer(*(packed.matrix for packed in matrices), *pointers, window=layer_attention.window or 0)

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        index: int,
        layer_attention: LayerAttention,
        head_dim: int,
        quantization: Quantization,
    ) -> "FusedLayer":
        """Pack a layer that has the parts of a Llama layer."""
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
        head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        matrices = [
            _pack_together(linears, quantization)
            for linears in (
                [attention.q_proj, attention.k_proj, attention.v_proj],
                [attention.o_proj],
                [mlp.gate_proj, mlp.up_proj],
                [mlp.down_proj],
            )
        ]
        shape = Shape(
            hidden=attention.q_proj.in_features,
            heads=attention.q_proj.out_features // head_dim,
            kv_heads=attention.k_proj.out_features // head_dim,
            head_dim=head_dim,
            intermediate=mlp.down_proj.in_features,
            epsilon=norms[0].variance_epsilon,
            scaling=layer_attention.scaling,
        )
        weights = [norm and norm.weight.detach().clone() for norm in (*norms, *head_norms)]
        return cls(index, layer_attention, matrices, weights, shape)


class FusedLayers(nn.Module):
    """Consecutive decoder layers of the same shape, run by one kernel call."""

    def __init__(self, members: list[FusedLayer]) -> None:
        super().__init__()
        self.members = members
        self.matrices = [matrix for member in members for matrix in member.matrices]
        self._layers = (Layer * len(members))(*(member.layer for member in members))
        self._shape = members[0].shape

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], paged: PagedBatch, **_: object
    ) -> Tensor:
        """hidden_states: [1, T, hidden] float32, overwritten by the result and returned."""
        lib = library()
        assert lib is not None
        cos, sin = position_embeddings
        self._shape.rotary_dim = cos.shape[-1]
        for member, layer in zip(self.members, self._layers, strict=True):
            layer.keys = paged.keys[member.index].data_ptr()
            layer.values = paged.values[member.index].data_ptr()
        lib.linalign_layers(
            self._layers,
            len(self.members),
            ctypes.byref(self._shape),
            ctypes.byref(cpu_attention.native_batch(paged)),
            cos.data_ptr(),
            sin.data_ptr(),
            hidden_states.data_ptr(),
            torch.get_num_threads(),
        )
        return hidden_states


@torch.inference_mode()
def replace_layers(model: PreTrainedModel, quantization: Quantization) -> None:
    """Fuse and pack layers where possible. model: In float32 on a CPU; weights of replaced layers are released."""
    attentions = probe(model, model.config.get_text_config().max_position_embeddings, paged=None)
    model.set_attn_implementation(cpu_attention.NAME)
    layers = getattr(model.base_model, "layers", None)
    if isinstance(layers, nn.ModuleList):
        for index, layer in enumerate(layers):
            fused = _fused(model, layer, index, attentions, quantization) if index in attentions else None
            layers[index] = FusedLayers([fused]) if fused else layer
        model.base_model.layers = _joined(layers)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and packable(child.weight):
                setattr(parent, name, PackedLinear(pack(child.weight, child.bias, quantization)))
    for parameter in model.parameters():
        # A copy, because the checkpoint's file stays mapped while a tensor refers to it.
        parameter.data = parameter.data.clone()
    _report(model)


def _joined(layers: nn.ModuleList) -> nn.ModuleList:
    """All layers as one FusedLayers, if all are fused and have the same shape; else unchanged."""
    members = [member for layer in layers if isinstance(layer, FusedLayers) for member in layer.members]
    if len(members) < len(layers) or len({bytes(member.shape) for member in members}) > 1:
        return layers
    return nn.ModuleList([FusedLayers(members)])


def _fused(
    model: PreTrainedModel,
    layer: nn.Module,
    index: int,
    attentions: Mapping[int, LayerAttention],
    quantization: Quantization,
) -> FusedLayer | None:
    """The layer fused. None if it has other parts than a Llama layer, or computes something else."""
    layer_attention = attentions[index]
    if not _has_llama_parts(layer) or layer_attention.softcap is not None:
        return None
    lossless: Quantization = "auto" if quantization == "auto" else "none"
    attention, rotary = cast(Any, layer.self_attn), cast(Any, model.base_model.rotary_emb)
    head_dim: int = attention.head_dim
    pool = [torch.zeros(1, PROBE_TOKENS, attention.k_proj.out_features // head_dim, head_dim)] * (index + 1)
    plan = Plan.of([Row(Branch([0] * PROBE_TOKENS, [0]), 0, PROBE_TOKENS)], [], PROBE_TOKENS)
    paged = PagedBatch.of(plan, pool, [x.clone() for x in pool], attentions)
    generator = torch.Generator().manual_seed(index)
    fused: FusedLayer | None = None
    for start in (0, model.config.get_text_config().max_position_embeddings - PROBE_TOKENS):
        hidden = torch.randn(1, PROBE_TOKENS, attention.q_proj.in_features, generator=generator)
        position_ids = torch.arange(start, start + PROBE_TOKENS)[None]
        arguments = {
            "position_ids": position_ids,
            "position_embeddings": rotary(hidden, position_ids=position_ids),
            "attention_mask": None,
            "past_key_values": None,
            "use_cache": False,
            "paged": paged,
        }
        expected = layer(hidden.clone(), **arguments)
        fused = fused or FusedLayer.of(layer, index, layer_attention, head_dim, lossless)
        error = (FusedLayers([fused])(hidden.clone(), **arguments) - expected).abs().max()
        if error > TOLERANCE * expected.abs().max():
            log.info("Layer %d differs from a Llama layer, so it keeps its own code", index)
            return None
    if lossless == quantization:
        return fused
    return FusedLayer.of(layer, index, layer_attention, head_dim, quantization)


def _has_llama_parts(layer: nn.Module) -> bool:
    parts = dict(layer.named_children())
    if set(parts) != LAYER_PARTS:
        return False
    attention, mlp = (dict(parts[name].named_children()) for name in ("self_attn", "mlp"))
    linears = [attention.get(name) for name in ATTENTION_PARTS] + [mlp.get(name) for name in MLP_PARTS - {"act_fn"}]
    return (
        set(attention) in (ATTENTION_PARTS, ATTENTION_PARTS | {"q_norm", "k_norm"})
        and set(mlp) == MLP_PARTS
        and all(type(linear) is nn.Linear and packable(linear.weight) for linear in linears)
        and all(hasattr(parts[name], "variance_epsilon") for name in ("input_layernorm", "post_attention_layernorm"))
    )


def _pack_together(linears: list[nn.Linear], quantization: Quantization) -> PackedMatrix:
    """Pack linear layers that have the same input as one matrix."""
    biases = [linear.bias for linear in linears]
    bias = None
    if any(b is not None for b in biases):
        zeros = [linear.weight.new_zeros(linear.out_features) for linear in linears]
        bias = torch.cat([zero if b is None else b for b, zero in zip(biases, zeros, strict=True)])
    return pack(torch.cat([linear.weight for linear in linears]), bias, quantization)


def _report(model: PreTrainedModel) -> None:
    sizes: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, FusedLayers | PackedLinear):
            for matrix in module.matrices:
                sizes[matrix.format] += matrix.nbytes
    formats = ", ".join(f"{size / 1e6:.0f} MB {format}" for format, size in sizes.most_common())
    log.info("Packed the weights: %s; %d decoder layers run fused", formats, num_fused_layers(model))


def fused_layers(model: PreTrainedModel) -> list[FusedLayers]:
    return [module for module in model.modules() if isinstance(module, FusedLayers)]


def num_fused_layers(model: PreTrainedModel) -> int:
    return sum(len(layers.members) for layers in fused_layers(model))
