"""What attention needs to know of one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass in plain arrays: all that a process needs to know to run it. T query tokens in one line.

    token_ids: [T] int64; −1 − i is the i-th token that the step before draws. row, position: [T] int32,
    of each query token. slots: [T] int64, the place in the pool, page × page_size + offset, of each.
    page_table: [rows, longest row's pages] int32, padded with page 0. context_lens: tokens of each row's
    context, its query tokens included. num_queries: query tokens of each row; decodes, which have one,
    come first. wanted: int64, the tokens whose logits are asked for.
    """

    token_ids: "np.ndarray[Any, Any]"
    row: "np.ndarray[Any, Any]"
    position: "np.ndarray[Any, Any]"
    slots: "np.ndarray[Any, Any]"
    page_table: "np.ndarray[Any, Any]"
    context_lens: list[int]
    num_queries: list[int]
    wanted: "np.ndarray[Any, Any]"

    @classmethod
    def of(cls, rows: Sequence[Row], wanted: Sequence[tuple[Row, int]], page_size: int) -> "Plan":
        """wanted: rows, and which of their tokens counted from the end, −1 being the last."""
        rows = sorted(rows, key=lambda row: row.num_tokens > 1)
        widths = [-(-row.end // page_size) for row in rows]
        table = np.zeros((len(rows), max(widths)), np.int32)
        for line, width, row in zip(table, widths, rows, strict=True):
            line[:width] = row.branch.pages[:width]
        num_queries = [row.num_tokens for row in rows]
        row_of = np.repeat(np.arange(len(rows), dtype=np.int32), num_queries)
        position = np.concatenate([np.arange(row.start, row.end, dtype=np.int32) for row in rows])
        ends = dict(zip(map(id, rows), np.cumsum(num_queries).tolist(), strict=True))
        return cls(
            token_ids=np.array([token for row in rows for token in row.tokens], np.int64),
            row=row_of,
            position=position,
            slots=table[row_of, position // page_size].astype(np.int64) * page_size + position % page_size,
            page_table=table,
            context_lens=[row.end for row in rows],
            num_queries=num_queries,
            wanted=np.array([ends[id(row)] + place for row, place in wanted], np.int64),
        )


@dataclass(slots=True)
class PagedBatch:
    """A Plan on the device, with the pool.

    keys, values: per layer [num_pages, page_size, num_kv_heads, head_dim], the whole pool.
    row, position, slots, page_table, context_lens, num_queries: see Plan.
    num_decodes: how many rows at the front have just one query token.
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
    def of(cls, plan: Plan, keys: list[Tensor], values: list[Tensor]) -> "PagedBatch":
        device = keys[0].device
        row, position, slots, page_table = (
            torch.from_numpy(array).to(device) for array in (plan.row, plan.position, plan.slots, plan.page_table)
        )
        return cls(
            keys=keys,
            values=values,
            row=row,
            position=position,
            slots=slots,
            page_table=page_table,
            context_lens=plan.context_lens,
            num_queries=plan.num_queries,
            num_decodes=plan.num_queries.count(1),
        )
