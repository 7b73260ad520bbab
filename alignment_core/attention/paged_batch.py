"""What attention needs to know of one step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from linalign.alignment_core.scheduling.step import Row
from linalign.alignment_core.transfer import to_device


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What a layer's own code asks of its attention: see `probe`."""

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

    @property
    def is_decode(self) -> bool:
        """Whether every row has one query token, and its logits are wanted, in order."""
        num_rows = len(self.num_queries)
        return len(self.token_ids) == num_rows and np.array_equal(self.wanted, np.arange(num_rows))

    def padded(self, num_rows: int, spare_page: int, page_size: int) -> "Plan":
        """The same decodes and, up to `num_rows`, some of a token that nobody has, in a page that nobody holds."""
        more = num_rows - len(self.num_queries)
        table = np.pad(self.page_table, ((0, more), (0, 0)), constant_values=spare_page)
        return Plan(
            token_ids=np.pad(self.token_ids, (0, more)),
            row=np.arange(num_rows, dtype=np.int32),
            position=np.pad(self.position, (0, more)),
            slots=np.pad(self.slots, (0, more), constant_values=spare_page * page_size),
            page_table=table,
            context_lens=self.context_lens + [1] * more,
            num_queries=[1] * num_rows,
            wanted=np.arange(num_rows),
        )


@dataclass(slots=True)
class PagedBatch:
    """A Plan on the device, with the pool.

    keys, values: per layer [num_pages, page_size, num_kv_heads, head_dim], the whole pool.
    row, position, slots, page_table, context_lens, num_queries: see Plan. contexts: context_lens, [rows]
    int32. query_ends: [rows + 1] int32, where each row's query tokens begin, and T.
    counter: [rows at least] int32, 0, 1, 2, … layers: what each of them asks of its attention, by its number.
    """

    keys: list[Tensor]
    values: list[Tensor]
    row: Tensor
    position: Tensor
    slots: Tensor
    page_table: Tensor
    contexts: Tensor
    query_ends: Tensor
    context_lens: list[int]
    num_queries: list[int]
    counter: Tensor
    layers: Mapping[int, LayerAttention]
    batch_invariant: bool = False
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _tiles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plan: Plan,
        keys: list[Tensor],
        values: list[Tensor],
        layers: Mapping[int, LayerAttention],
        batch_invariant: bool = False,
    ) -> "PagedBatch":
        device = keys[0].device
        return cls(
            keys=keys,
            values=values,
            row=to_device(plan.row, device),
            position=to_device(plan.position, device),
            slots=to_device(plan.slots, device),
            page_table=to_device(plan.page_table, device),
            contexts=to_device(np.array(plan.context_lens, np.int32), device),
            query_ends=to_device(np.cumsum([0, *plan.num_queries], dtype=np.int32), device),
            context_lens=plan.context_lens,
            num_queries=plan.num_queries,
            counter=to_device(np.arange(len(plan.num_queries), dtype=np.int32), device),
            layers=layers,
            batch_invariant=batch_invariant,
        )

    @property
    def num_decodes(self) -> int:
        """How many rows at the front have just one query token."""
        return self.num_queries.count(1)

    def tiles(self, num_queries: int) -> tuple[Tensor, Tensor]:
        """The rows of several query tokens, cut: of each piece of up to `num_queries` its row and its first token."""
        if num_queries not in self._tiles:
            ends = np.cumsum(self.num_queries).tolist()
            pieces = [
                (row, start)
                for row, (length, end) in enumerate(zip(self.num_queries, ends, strict=True))
                for start in range(end - length, end, num_queries)
                if length > 1
            ]
            rows, starts = to_device(np.array(pieces, np.int32).T.copy(), self.row.device)
            self._tiles[num_queries] = rows, starts
        return self._tiles[num_queries]
