"""The CUDA backend: torch's own flash attention for rows of any length, over the page table. No gather, no mask.

Why this one: docs/decisions/0008.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alignment_core.attention.paged_batch import LayerAttention, PagedBatch
from alignment_core.attention.sdpa import refuse_more_than_causal, store

NAME = "linalign_varlen"
PAGE_SIZES = (16, 32, 64, 128, 256)
PROBE_TOLERANCE = 2e-2  # bfloat16


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedBatch,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """As `sdpa.attend`, for 16-bit numbers on CUDA. Raises ValueError for a soft cap, which the kernels don't know."""
    refuse_more_than_causal(module, attention_mask, kwargs)
    if softcap is not None:
        raise ValueError("flash attention has no soft cap")
    keys, values = store(module, key, value, paged, LayerAttention(scaling, sliding_window, softcap))
    out: Tensor = kernel()(
        query[0].transpose(0, 1),
        keys,
        values,
        paged.query_ends,
        None,
        paged.max_queries,
        paged.max_context,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
        seqused_k=paged.contexts,
        block_table=paged.page_table,
        num_splits=1 if paged.batch_invariant else None,
    )
    return out[None], None


def kernel() -> Callable[..., Any]:
    """torch's function; older versions of torch lack the module."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def smallest_page(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """The least page size with which the installed kernels give what attention is; 0 if there is none."""
    return next((size for size in PAGE_SIZES if _works(num_heads, num_kv_heads, head_dim, size, dtype, device)), 0)


def _works(
    num_heads: int, num_kv_heads: int, head_dim: int, size: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """A row of one query token and a row of three, the contexts over pages that are out of order."""
    generator = torch.Generator().manual_seed(size)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def ints(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    query = random(4, num_heads, head_dim)
    keys, values = random(4, size, num_kv_heads, head_dim), random(4, size, num_kv_heads, head_dim)
    table = ints(2, 0, 1, 3).view(2, 2)
    contexts = (size + 2, 5)
    try:
        out = kernel()(
            query, keys, values, ints(0, 1, 4), None, 3, 2 * size,
            window_size=(-1, 0), enable_gqa=True, seqused_k=ints(*contexts), block_table=table,
        )  # fmt: skip
    except (ImportError, TypeError, RuntimeError):  # no such module, argument, kernel
        return False
    line, expected = 0, []
    for row, num_queries in enumerate((1, 3)):
        k, v = (
            pool[table[row].long()].flatten(0, 1).float().repeat_interleave(num_heads // num_kv_heads, 1)
            for pool in (keys, values)
        )
        for i in range(num_queries):
            end = contexts[row] - num_queries + 1 + i
            weights = torch.softmax(torch.einsum("hd,thd->ht", query[line].float(), k[:end]) * head_dim**-0.5, -1)
            expected.append(torch.einsum("ht,thd->hd", weights, v[:end]))
            line += 1
    return bool((out.float() - torch.stack(expected)).abs().max() < PROBE_TOLERANCE)
