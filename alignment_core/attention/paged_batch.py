"""What attention needs to know of one step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignment_core.scheduler import Row


@dataclass(slots=True)
class PagedBatch:
    """The rows of one forward pass, decodes (one query token) first, packed into one line of T tokens.

    keys, values: per layer [num_pages, page_size, num_kv_heads, head_dim], the whole pool.
    slots: [T] int64, the place in the pool, page × page_size + offset, of each query token.
    page_table: [rows, longest row's pages] int64, padded with page 0.
    context_lens: [rows] int64, tokens of the row's context, its query tokens included.
    num_queries: query tokens of each row. num_decodes: how many rows at the front have just one.
    layers_called: which layers' attention came through the backend.
    """

    keys: list[Tensor]
    values: list[Tensor]
    slots: Tensor
    page_table: Tensor
    context_lens: Tensor
    num_queries: list[int]
    num_decodes: int
    layers_called: set[int] = field(default_factory=set)
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Row], keys: list[Tensor], values: list[Tensor]) -> "PagedBatch":
        """rows: decodes first."""
        device, page_size = keys[0].device, keys[0].shape[1]
        pages = [row.branch.pages[: -(-row.end // page_size)] for row in rows]
        width = max(len(line) for line in pages)
        page_table = torch.tensor([line + [0] * (width - len(line)) for line in pages], device=device)
        slots = [
            row.branch.pages[position // page_size] * page_size + position % page_size
            for row in rows
            for position in range(row.start, row.end)
        ]
        return cls(
            keys=keys,
            values=values,
            slots=torch.tensor(slots, device=device),
            page_table=page_table,
            context_lens=torch.tensor([row.end for row in rows], device=device),
            num_queries=[row.num_tokens for row in rows],
            num_decodes=sum(row.num_tokens == 1 for row in rows),
        )
