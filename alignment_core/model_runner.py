"""One forward pass for all rows of a step, over the paged KV cache."""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from alignment_core.attention import native, sdpa
from alignment_core.attention.paged_batch import PagedBatch, Plan
from alignment_core.cpu.native import library
from alignment_core.scheduler import Row, Step
from alignment_core.sequence import Branch
from alignment_core.tensor_parallel import Followers

AttentionInterface.register(sdpa.NAME, sdpa.attend)
AttentionInterface.register(native.NAME, native.attend)


class ModelRunner:
    """A transformers causal LM and the pool of keys and values that its layers share.

    The pool is [num_pages, page_size, num_kv_heads, head_dim] per layer, for keys and for values.
    followers: the other processes of a model in several parts; they run every plan along.
    Raises ValueError if the architecture does not run every layer through our attention.
    """

    def __init__(
        self, model: PreTrainedModel, num_pages: int, page_size: int, followers: Followers | None = None
    ) -> None:
        self.model = model
        self.page_size = page_size
        self.followers = followers
        self.num_forwards = 0
        if followers is not None:
            followers.tell((num_pages, page_size))
        has_kernels = model.device.type == "cpu" and model.dtype == torch.float32 and library() is not None
        model.set_attn_implementation(native.NAME if has_kernels else sdpa.NAME)
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ValueError(
                f"{type(model).__name__} has layers of a kind that can't be served: {', '.join(sorted(kinds))}"
            )
        shape = (num_pages, page_size, *_kv_heads_and_dim(model))
        layers = range(config.num_hidden_layers)
        self._keys = [_zeros(shape, model.dtype, model.device) for _ in layers]
        self._values = [_zeros(shape, model.dtype, model.device) for _ in layers]
        self._check()

    def forward(self, step: Step, drawn: Tensor | None = None) -> Tensor:
        """Run the step. Returns float32 logits [rows, V] for the sequences in `step.drawing`, in that
        order: for its newest token and then for each draft, those of the sequence's branches in theirs.

        drawn: the tokens of the step before, int64, where the host does not know them yet.
        """
        wanted = [
            (row, place)
            for sequence in step.drawing
            for place in range(-1 - len(step.drafts(sequence)), 0)
            for row in step.rows[sequence]
        ]
        plan = Plan.of([row for rows in step.rows.values() for row in rows], wanted, self.page_size)
        if self.followers is not None:
            self.followers.tell(plan)
        return self.run(plan, drawn)

    @torch.inference_mode()
    def run(self, plan: Plan, drawn: Tensor | None = None) -> Tensor:
        """Float32 logits [wanted, V]."""
        device = self.model.device
        token_ids = torch.from_numpy(plan.token_ids).to(device)
        if (plan.token_ids < 0).any():
            assert drawn is not None
            token_ids = torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp(min=0)], token_ids)
        paged = PagedBatch.of(plan, self._keys, self._values)
        output = self.model(
            input_ids=token_ids[None],
            position_ids=paged.position[None].long(),
            logits_to_keep=torch.from_numpy(plan.wanted).to(device),
            use_cache=False,
            paged=paged,
        )
        self.num_forwards += 1
        if len(paged.layers) != len(self._keys):
            raise ValueError(
                f"{type(self.model).__name__} has layers that do not use transformers' attention interface"
            )
        logits: Tensor = output.logits[0]
        return logits.float()

    def _check(self) -> None:
        """One token through the whole model: an architecture that can't be served fails here, not in a request."""
        row = Row(Branch(tokens=[0], pages=[0]), 0, 1)
        try:
            self.run(Plan.of([row], [(row, -1)], self.page_size))
        except TypeError as error:
            name = type(self.model).__name__
            raise ValueError(f"{name} does not pass its arguments on to transformers' attention interface") from error
        self.num_forwards = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a slot that is masked out still counts as 0 × its content, and 0 × NaN is NaN.

    NumPy's, on a CPU, as they take no memory until they are written; torch's own do.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that one token of one branch takes in the pool, all layers together."""
    num_kv_heads, head_dim = _kv_heads_and_dim(model)
    layers: int = model.config.get_text_config().num_hidden_layers
    itemsize: int = model.dtype.itemsize
    return 2 * layers * num_kv_heads * head_dim * itemsize


def _kv_heads_and_dim(model: PreTrainedModel) -> tuple[int, int]:
    config = model.config.get_text_config()
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    num_kv_heads //= getattr(model, "_tp_size", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return num_kv_heads, head_dim
