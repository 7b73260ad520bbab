"""One forward pass for all rows of a step, over the paged KV cache."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from linalign.alignment_core.attention import sdpa
from linalign.alignment_core.attention.paged_batch import LayerAttention, PagedBatch, Plan
from linalign.alignment_core.attention.probe import probe
from linalign.alignment_core.cpu import attention as cpu_attention
from linalign.alignment_core.cpu.kernels import library
from linalign.alignment_core.cpu.layers import fused_layers
from linalign.alignment_core.execution.architecture import (
    has_outliers,
    local_heads_and_dim,
    scales_by_length,
    text_config,
    unserved_layers,
)
from linalign.alignment_core.execution.batch_invariant import run_in_blocks
from linalign.alignment_core.execution.cuda_graphs import Graphs, padded_size
from linalign.alignment_core.execution.followers import Followers
from linalign.alignment_core.execution.halving import halve
from linalign.alignment_core.execution.static_decodes import StaticDecodes, resolve
from linalign.alignment_core.scheduling.sequence import Branch
from linalign.alignment_core.scheduling.step import Row, Step
from linalign.alignment_core.transfer import to_device

log = logging.getLogger(__name__)

AttentionInterface.register(sdpa.NAME, sdpa.attend)
AttentionInterface.register(cpu_attention.NAME, cpu_attention.attend)

KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """The configuration that all processes of a model share."""

    page_size: int  # tokens
    max_model_len: int  # tokens of the longest row
    max_rows: int = 0  # most rows of a decode step in fixed shapes; 0 for no fixed shapes
    kv_cache_dtype: str = "auto"  # the model's dtype, or one of KV_DTYPES
    batch_invariant: bool = False  # whether no number depends on the other rows of a batch
    eager: bool = False  # neither CUDA graphs nor torch.compile


class ModelRunner:
    """A transformers causal LM and the pool of keys and values that its layers share.

    The pool is [num_pages + 1, page_size, num_kv_heads, head_dim] per layer, for keys and for values. Its last page is
    spare, for padding rows. `allocate` makes the pool.

    followers: The other processes of a tensor-parallel model; they run the same steps.
    Raises ValueError if not every layer runs through our attention, or for a configuration that is not supported.
    """

    def __init__(self, model: PreTrainedModel, config: RunnerConfig, followers: Followers | None = None) -> None:
        self.model = model
        self.config = config
        self.followers = followers
        self.num_forwards = 0
        if followers is not None:
            followers.send(config)
        if kinds := unserved_layers(model):
            raise ValueError(f"{type(model).__name__} has layers of a kind that can't be served: {', '.join(kinds)}")
        self.page_size = config.page_size
        self.backend = _choose_backend(model)
        self.kv_dtype: torch.dtype = KV_DTYPES.get(config.kv_cache_dtype, model.dtype)
        if self.backend == cpu_attention.NAME and self.kv_dtype != torch.float32:
            raise ValueError(f"the KV cache of a CPU is float32, not {config.kv_cache_dtype}")
        if self.kv_dtype == torch.float8_e4m3fn and model.device.type == "cuda" and not _has_fp8():
            raise ValueError("a KV cache in fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later")
        self._static: StaticDecodes | None = None
        self._make_pool(1)
        self._layers = self._probe()
        model.set_attn_implementation(self.backend)
        if config.batch_invariant and model.device.type == "cuda":
            if self.backend == sdpa.NAME or has_outliers(model):
                raise ValueError("batch_invariant needs Triton, and does not support 8-bit weights of bitsandbytes")
            run_in_blocks(model)
        elif self.captures:
            compile_layers(model)

    @property
    def captures(self) -> bool:
        """Whether decode steps become CUDA graphs; not if the attention or the model reads values on the host."""
        looks = self.backend == sdpa.NAME or scales_by_length(self.model) or has_outliers(self.model)
        return self.model.device.type == "cuda" and not looks and not self.config.eager

    def allocate(self, num_pages: int) -> None:
        """Make the pool, and the tensors of decodes in fixed shapes."""
        if self.followers is not None:
            self.followers.send(num_pages)
        self._make_pool(num_pages)
        config, device = self.config, self.model.device
        if config.max_rows:
            max_rows = padded_size(config.max_rows)
            self.graphs = Graphs(device, self.captures)
            self.logits = torch.zeros(max_rows, text_config(self.model).vocab_size, device=device)
            self.drawn = torch.zeros(max_rows, dtype=torch.int64, device=device)
            self._static = StaticDecodes(
                self._call,
                self.logits,
                self.drawn,
                self._keys,
                self._values,
                self._layers,
                spare_page=num_pages,
                max_pages=-(-config.max_model_len // self.page_size),
                graphs=self.graphs,
                batch_invariant=config.batch_invariant,
            )
            if self.captures:
                self._static.warm_up()

    def forward(self, step: Step) -> Tensor:
        """Run the step. Returns float32 logits, [rows, V]: for each sequence in `step.drawing` the rows of its branches
        after its newest token, and then after each draft.
        """
        wanted = [
            (row, place)
            for sequence in step.drawing
            for place in range(-1 - len(step.drafts(sequence)), 0)
            for row in step.rows[sequence]
        ]
        return self._run_in_parts([row for rows in step.rows.values() for row in rows], wanted)

    @torch.inference_mode()
    def _run_in_parts(self, rows: list[Row], wanted: list[tuple[Row, int]]) -> Tensor:
        """As `run`, but a step too large for the GPU's memory is halved, down to a token. Raises OutOfMemoryError."""
        plan = Plan.of(rows, wanted, self.page_size)
        num_tokens = len(plan.token_ids)
        if self.followers is not None:
            self.followers.send(plan)
            return self.run(plan)  # no retry: the followers have run the step
        try:
            return self.run(plan)
        except torch.OutOfMemoryError:
            if num_tokens == 1:
                raise
            log.warning("A step of %d tokens does not fit into the GPU's memory: it runs in two halves", num_tokens)
        if self.model.device.type == "cuda":  # only now: the exception held references to the tensors of the step
            torch.cuda.empty_cache()
        halves = halve(rows, wanted)
        logits = torch.cat([self._run_in_parts(half.rows, half.wanted).to("cpu", copy=True) for half in halves])
        lines = [line for half in halves for line in half.lines]
        return self._in_place(logits[torch.argsort(torch.tensor(lines))])

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """Float32 logits [wanted, V]; with fixed shapes, valid until the next run."""
        self.num_forwards += 1
        if self._static is not None and plan.is_decode and len(plan.num_queries) <= len(self.logits):
            return self._static.run(plan)[: len(plan.wanted)]
        device = self.model.device
        paged = PagedBatch.of(plan, self._keys, self._values, self._layers, self.config.batch_invariant)
        token_ids = to_device(plan.token_ids, device)
        if (plan.token_ids < 0).any():
            token_ids = resolve(token_ids, self.drawn)
        return self._in_place(self._call(token_ids, paged, to_device(plan.wanted, device)))

    def _in_place(self, logits: Tensor) -> Tensor:
        """The logits in float32 on the device; in `self.logits`, where draws in fixed shapes read them, if they fit."""
        if self._static is not None and len(logits) <= len(self.logits):
            return self.logits[: len(logits)].copy_(logits)
        return logits.to(self.model.device, torch.float32)

    def _call(self, token_ids: Tensor, paged: PagedBatch, wanted: Tensor | int = 0) -> Tensor:
        output = self.model(
            input_ids=token_ids[None],
            position_ids=paged.position[None].long(),
            logits_to_keep=wanted,
            use_cache=False,
            paged=paged,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _make_pool(self, num_pages: int) -> None:
        self._keys, self._values = [], []
        shape = (num_pages + 1, self.page_size, *local_heads_and_dim(self.model))
        for _ in range(text_config(self.model).num_hidden_layers):
            self._keys.append(_zeros(shape, self.kv_dtype, self.model.device))
            self._values.append(_zeros(shape, self.kv_dtype, self.model.device))

    def _probe(self) -> dict[int, LayerAttention]:
        """The attention that each layer needs. An unsupported architecture fails here, not in a request."""
        row = Row(Branch(tokens=[0], pages=[0]), 0, 1)
        members = [member for layers in fused_layers(self.model) for member in layers.members]
        fused = {member.index: member.layer_attention for member in members}
        paged = PagedBatch.of(Plan.of([row], [], self.page_size), self._keys, self._values, fused)
        attentions = fused | probe(self.model, self.config.max_model_len, paged=paged)
        if len(attentions) != len(self._keys):
            raise ValueError(
                f"{type(self.model).__name__} has layers that do not use transformers' attention interface"
            )
        return attentions

    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        num_kv_heads, head_dim = local_heads_and_dim(self.model)
        return 2 * len(self._keys) * self.page_size * num_kv_heads * head_dim * self.kv_dtype.itemsize

    def activation_bytes(self, num_tokens: int, num_wanted: int, draw: Callable[[Tensor], object]) -> int:
        """The most bytes of CUDA memory that a step takes beside weights and pool: its forward pass, its logits, and
        twice its draw, because graphs keep their own memory.
        """
        num_pages = -(-num_tokens // self.page_size)
        row = Row(Branch(tokens=[0] * num_tokens, pages=[0] * num_pages), 0, num_tokens)
        plan = Plan.of([row], [(row, -1)] * num_wanted, self.page_size)
        if self.followers is not None:
            self.followers.send(plan)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logits = self.run(plan)
        forward: int = torch.cuda.max_memory_allocated() - before
        before = torch.cuda.memory_allocated()
        draw(logits)
        drawing: int = torch.cuda.max_memory_allocated() - before
        self.num_forwards = 0
        return forward + logits.nbytes + 2 * drawing


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Let torch fuse the operations of decoder layers around their attention."""
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True, backend=backend)


def _choose_backend(model: PreTrainedModel) -> str:
    """The name of the attention backend for the model's device."""
    if model.device.type == "cpu":
        return cpu_attention.NAME if model.dtype == torch.float32 and library() is not None else sdpa.NAME
    try:
        from linalign.alignment_core.attention import paged_triton
    except ImportError:  # Triton comes with torch for CUDA, on Linux
        log.warning("Triton is not installed: attention gathers pages, which is slow")
        return sdpa.NAME
    AttentionInterface.register(paged_triton.NAME, paged_triton.attend)
    return paged_triton.NAME


def _has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros. A masked slot still contributes 0 × its content, and 0 × NaN is NaN, so slots start as 0.

    On a CPU the zeros are NumPy's, which take no memory until they are written; torch's do.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
