"""The data that attention needs of one step: a Plan on the host, a PagedBatch on the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from linalign.alignment_core.scheduling.step import Row
from linalign.alignment_core.transfer import to_device


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The parameters that a layer's own code passes to its attention: see `probe`."""

    scaling: float  # factor of the products of queries and keys
    window: int | None  # tokens that a query sees, itself included; None for all up to itself
    softcap: float | None  # scores become softcap × tanh(score / softcap); None for no cap


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass as plain arrays: all that a process needs to run it.

    The T query tokens of all rows follow each other. Rows of one query token (decodes) come first.
    """

    token_ids: "np.ndarray[Any, Any]"  # [T] int64; −1 − i is a placeholder for the i-th token that the last step draws
    row: "np.ndarray[Any, Any]"  # [T] int32, the row of each query token
    position: "np.ndarray[Any, Any]"  # [T] int32, the position of each query token in its context
    slots: "np.ndarray[Any, Any]"  # [T] int64, where each token is in the pool: page × page_size + offset
    page_table: "np.ndarray[Any, Any]"  # [rows, pages of the longest row] int32, padded with page 0
    context_lens: list[int]  # tokens of each row's context, query tokens included
    num_queries: list[int]  # query tokens of each row
    wanted: "np.ndarray[Any, Any]"  # [wanted] int64, indices of the query tokens whose logits are requested

    @classmethod
    def of(cls, rows: Sequence[Row], wanted: Sequence[tuple[Row, int]], page_size: int) -> "Plan":
        """wanted: The tokens whose logits are requested: a row, and an index from its end, −1 for the last token."""
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
        """Whether every row has one query token, and the logits of all rows are wanted, in order."""
        num_rows = len(self.num_queries)
        return len(self.token_ids) == num_rows and np.array_equal(self.wanted, np.arange(num_rows))

    def padded(self, num_rows: int, spare_page: int, page_size: int) -> "Plan":
        """The same decodes, padded to `num_rows` rows with token 0 in the spare page, which no branch holds."""
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
    """A Plan on the device, with the pool."""

    keys: list[Tensor]  # the pool, for each layer [num_pages, page_size, num_kv_heads, head_dim]
    values: list[Tensor]  # as keys
    row: Tensor  # as in Plan
    position: Tensor  # as in Plan
    slots: Tensor  # as in Plan
    page_table: Tensor  # as in Plan
    contexts: Tensor  # context_lens as a tensor, [rows] int32
    query_ends: Tensor  # [rows + 1] int32, where each row's query tokens begin, and T
    context_lens: list[int]  # as in Plan
    num_queries: list[int]  # as in Plan
    counter: Tensor  # [at least rows] int32: 0, 1, 2, …
    layers: Mapping[int, LayerAttention]  # by layer number
    batch_invariant: bool = False  # see RunnerConfig
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)  # sdpa's, by first row and window
    _tiles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # results of `tiles`

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
        """Number of rows with one query token; they come first."""
        return self.num_queries.count(1)

    def tiles(self, num_queries: int) -> tuple[Tensor, Tensor]:
        """The rows of several query tokens, cut into tiles of up to `num_queries` tokens.

        Returns each tile's row and the index of its first query token among all T: [tiles] int32 each.
        """
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
