"""What attention needs to know of one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from alignment_core.scheduler import Row


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What a layer's own code asked of its attention."""

    scaling: float
    window: int | None
    softcap: float | None


@dataclass(slots=True)
class PagedBatch:
    """The rows of one forward pass, decodes (one query token) first, packed into one line of T tokens.

    keys, values: per layer [num_pages, page_size, num_kv_heads, head_dim], the whole pool.
    row, position: [T] int32, of each query token.
    slots: [T] int64, the place in the pool, page × page_size + offset, of each query token.
    page_table: [rows, longest row's pages] int32, padded with page 0.
    context_lens: tokens of each row's context, its query tokens included.
    num_queries: query tokens of each row. num_decodes: how many rows at the front have just one.
    layers: what came through the backend, by layer.
    """

    keys: list[Tensor]
    values: list[Tensor]
    row: Tensor
    position: Tensor
    slots: Tensor
    page_table: Tensor
    context_lens: list[int]
    num_queries: list[int]
    num_decodes: int
    layers: dict[int, LayerAttention] = field(default_factory=dict)
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Row], keys: list[Tensor], values: list[Tensor]) -> "PagedBatch":
        """rows: decodes first."""
        device, page_size = keys[0].device, keys[0].shape[1]
        widths = [-(-row.end // page_size) for row in rows]
        table = np.zeros((len(rows), max(widths)), np.int32)
        for line, width, row in zip(table, widths, rows, strict=True):
            line[:width] = row.branch.pages[:width]
        num_queries = [row.num_tokens for row in rows]
        row_of = np.repeat(np.arange(len(rows), dtype=np.int32), num_queries)
        position = np.concatenate([np.arange(row.start, row.end, dtype=np.int32) for row in rows])
        slots = table[row_of, position // page_size].astype(np.int64) * page_size + position % page_size
        return cls(
            keys=keys,
            values=values,
            row=torch.from_numpy(row_of).to(device),
            position=torch.from_numpy(position).to(device),
            slots=torch.from_numpy(slots).to(device),
            page_table=torch.from_numpy(table).to(device),
            context_lens=[row.end for row in rows],
            num_queries=num_queries,
            num_decodes=sum(row.num_tokens == 1 for row in rows),
        )
