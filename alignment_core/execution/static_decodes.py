"""Decode steps in tensors of fixed addresses and a few fixed sizes, as CUDA graphs need."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from linalign.alignment_core.attention.paged_batch import LayerAttention, PagedBatch, Plan
from linalign.alignment_core.execution.cuda_graphs import Graphs, padded_size, padded_sizes
from linalign.alignment_core.scheduling.sequence import Branch
from linalign.alignment_core.scheduling.step import Row
from linalign.alignment_core.transfer import to_device


class StaticDecodes:
    """Runs plans of decodes, padded with rows that write to a spare page.

    forward: Function from token ids, [rows], and the batch to logits, [rows, V].
    logits: [max_rows, V] float32, where the result is written.
    drawn: [max_rows] int64, the tokens that the step before has drawn.
    keys, values: The pool. layers: See PagedBatch.
    spare_page: The number of the page for padding rows. max_pages: Most pages of one row.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, PagedBatch], Tensor],
        logits: Tensor,
        drawn: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        layers: Mapping[int, LayerAttention],
        spare_page: int,
        max_pages: int,
        graphs: Graphs,
        batch_invariant: bool,
    ) -> None:
        self._layers, self._batch_invariant = layers, batch_invariant
        self._forward, self._logits, self._drawn, self._graphs = forward, logits, drawn, graphs
        self._keys, self._values, self._spare_page = keys, values, spare_page
        max_rows, device = len(logits), logits.device
        self._token_ids = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._slots = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._position = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._contexts = torch.ones(max_rows, dtype=torch.int32, device=device)
        self._page_table = torch.full((max_rows, max_pages), spare_page, dtype=torch.int32, device=device)
        self._counter = torch.arange(max_rows + 1, dtype=torch.int32, device=device)

    def run(self, plan: Plan) -> Tensor:
        """Float32 logits [rows, V] of a plan that `is_decode`; valid until the next run."""
        size = padded_size(len(plan.num_queries))
        page_size = self._keys[0].shape[1]
        plan = plan.padded(size, self._spare_page, page_size)
        for place, array in (
            (self._token_ids, plan.token_ids),
            (self._slots, plan.slots),
            (self._position, plan.position),
            (self._contexts, np.array(plan.context_lens, np.int32)),
            (self._page_table[:, : plan.page_table.shape[1]], plan.page_table),  # no row reads beyond its context
        ):
            place[:size].copy_(to_device(array, place.device))
        self._graphs.run(("forward", size), lambda: self._step(size, plan))
        return self._logits[:size]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every size once, the largest first, so that the other graphs reuse its memory."""
        page_size = self._keys[0].shape[1]
        row = Row(Branch(tokens=[0], pages=[self._spare_page]), 0, 1)
        plan = Plan.of([row], [(row, -1)], page_size)
        for size in reversed(padded_sizes(len(self._logits))):
            self.run(plan.padded(size, self._spare_page, page_size))

    def _step(self, size: int, plan: Plan) -> None:
        """plan: Only for its lists, which the backends of graphs do not read."""
        paged = PagedBatch(
            keys=self._keys,
            values=self._values,
            row=self._counter[:size],
            position=self._position[:size],
            slots=self._slots[:size],
            page_table=self._page_table[:size],
            contexts=self._contexts[:size],
            query_ends=self._counter[: size + 1],
            context_lens=plan.context_lens,
            num_queries=plan.num_queries,
            counter=self._counter,
            layers=self._layers,
            batch_invariant=self._batch_invariant,
        )
        token_ids = resolve(self._token_ids[:size], self._drawn)
        self._logits[:size].copy_(self._forward(token_ids, paged))


def resolve(token_ids: Tensor, drawn: Tensor) -> Tensor:
    """Token ids with placeholders replaced by the tokens of the step before (`Plan.token_ids`), and NO_TOKEN by 0."""
    return torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp(min=0)].clamp(min=0), token_ids)
