"""The backend for any device: gathers each row's pages and calls torch's attention.

Decode rows run as one padded batch. Prefill rows run one by one, so that no mask is larger than [query tokens, context]
of one row. Supports grouped-query heads, sliding windows and soft-capping.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from linalign.alignment_core.attention.paged_batch import LayerAttention, PagedBatch

NAME = "linalign_paged"  # a name with "sdpa" in it makes transformers refuse models with soft-capping


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedBatch,
    **_: object,
) -> tuple[Tensor, None]:
    """Store the step's keys and values, then compute the attention of every row to its own context.

    query: [1, num_heads, T, head_dim], after the rotary embedding.
    key, value: [1, num_kv_heads, T, head_dim], the keys after the rotary embedding.
    attention_mask: Must be None; `paged.layers` has the windows.

    Returns [1, T, num_heads, head_dim], and None in place of weights. Raises ValueError for a mask.
    """
    layer, (keys, values) = asked_by(module, attention_mask, paged), store(module, key, value, paged)
    parts = []
    if paged.num_decodes:
        rows = slice(0, paged.num_decodes)
        q = query[0, :, rows].transpose(0, 1)  # [rows, num_heads, head_dim]
        num_kv_heads = keys.shape[2]
        # The heads of a group share one key head: treat them as queries.
        q = q.reshape(len(q), num_kv_heads, -1, q.shape[-1])
        pages = paged.page_table[rows, : _width(paged, rows)]
        k, v = (_gather(pool, pages).to(query.dtype) for pool in (keys, values))
        k, v, mask = _isolated(k, v, _mask(paged, rows, layer.window))
        out = _attention(q, k, v, mask, layer)
        parts.append(out.flatten(1, 2))
    start = paged.num_decodes
    for index in range(paged.num_decodes, len(paged.num_queries)):
        rows = slice(index, index + 1)
        end = start + paged.num_queries[index]
        pages = paged.page_table[rows, : _width(paged, rows)]
        k, v = (_gather(pool, pages).to(query.dtype) for pool in (keys, values))
        k, v, mask = _isolated(k, v, _mask(paged, rows, layer.window))
        k, v = (_repeat(x, query.shape[1]) for x in (k, v))
        out = _attention(query[:, :, start:end], k, v, mask, layer)
        parts.append(out[0].transpose(0, 1))
        start = end
    return torch.cat(parts)[None], None


def asked_by(module: nn.Module, mask: Tensor | None, paged: PagedBatch) -> LayerAttention:
    """The layer's attention parameters. Raises ValueError if the layer passes a mask, which `probe` did not see."""
    if mask is not None:
        raise ValueError(f"{type(module).__name__} uses its own attention masks, which can't be served")
    return paged.layers[int(module.layer_idx)]  # type: ignore[arg-type]


def store(module: nn.Module, key: Tensor, value: Tensor, paged: PagedBatch) -> tuple[Tensor, Tensor]:
    """Write the step's keys and values, [1, num_kv_heads, T, head_dim], to the layer's pool. Returns that pool."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    for pool, new in ((paged.keys[layer], key), (paged.values[layer], value)):
        limit = torch.finfo(pool.dtype).max
        if limit < torch.finfo(new.dtype).max:  # else large numbers would become infinite or NaN
            new = new.clamp(-limit, limit)
        new = new.to(pool.dtype)
        _bytes_of(pool).flatten(0, 1).index_copy_(0, paged.slots, _bytes_of(new[0].transpose(0, 1)))
    return paged.keys[layer], paged.values[layer]


def _bytes_of(x: Tensor) -> Tensor:
    """8-bit numbers as integers, because torch can move 8-bit floats on few devices. Other tensors unchanged."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _width(paged: PagedBatch, rows: slice) -> int:
    """Pages of the longest context of these rows."""
    return -(-max(paged.context_lens[rows]) // paged.keys[0].shape[1])


def _gather(pool: Tensor, pages: Tensor) -> Tensor:
    """The content of pages. pages: [rows, num_pages]. Returns [rows, num_kv_heads, num_pages × page_size, head_dim]."""
    return _bytes_of(pool)[pages].view(pool.dtype).flatten(1, 2).transpose(1, 2)


def _repeat(x: Tensor, num_heads: int) -> Tensor:
    """One key head for each query head."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _mask(paged: PagedBatch, rows: slice, window: int | None) -> Tensor:
    """Which positions each query token sees: [rows, 1, query tokens, width × page_size] bool, cached per window."""
    if (rows.start, window) not in paged.masks:
        num_queries = paged.num_queries[rows.start]
        device = paged.slots.device
        keys = torch.arange(_width(paged, rows) * paged.keys[0].shape[1], device=device)
        ends = paged.contexts[rows, None] - torch.arange(num_queries - 1, -1, -1, device=device)
        position = ends[:, None, :, None] - 1
        visible = keys <= position
        if window is not None:
            visible &= keys > position - window
        paged.masks[rows.start, window] = visible
    return paged.masks[rows.start, window]


def _isolated(k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make keys and values that are not finite affect only the queries that see them.

    k, v: [rows, num_kv_heads, positions, head_dim].
    visible: [rows, 1, query tokens, positions] bool.

    Returns keys and values with 0 at positions that are not finite, and the mask to add to the scores: NaN at these
    positions, −inf where a query does not see the key, else 0. Without this a NaN would reach all queries, as 0 × NaN
    is NaN.
    """
    finite = (k.isfinite() & v.isfinite()).all(dim=-1, keepdim=True).all(dim=1, keepdim=True)
    k, v = (torch.where(finite, x, 0.0) for x in (k, v))
    return k, v, torch.where(visible, torch.where(finite, 0.0, torch.nan).transpose(-1, -2), -torch.inf)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, layer: LayerAttention) -> Tensor:
    """Attention with soft-capping if the layer has it. mask: float32, added to the scores."""
    if layer.softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=layer.scaling)
    scores = layer.softcap * torch.tanh(q @ k.transpose(-1, -2) * layer.scaling / layer.softcap)
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v
