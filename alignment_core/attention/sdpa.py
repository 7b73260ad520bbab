"""The backend that runs anywhere: gathers each row's pages and calls torch's own attention.

Decode rows run as one padded batch; prefill rows one by one, so that no mask is larger than one
row's [query tokens, context]. Grouped-query heads, sliding windows and soft-capping included.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from linalign.alignment_core.attention.paged_batch import LayerAttention, PagedBatch

NAME = "linalign_paged"  # not "…sdpa": transformers would refuse models with soft-capping


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
    """Store the step's keys and values, then attend to every row's own context, as `paged.layers` has it.

    query: [1, num_heads, T, head_dim]; key, value: [1, num_kv_heads, T, head_dim], after the rotary
    embedding. Returns [1, T, num_heads, head_dim]. Raises ValueError for a mask.
    """
    asked, (keys, values) = asked_by(module, attention_mask, paged), store(module, key, value, paged)
    parts = []
    if paged.num_decodes:
        rows = slice(0, paged.num_decodes)
        q = query[0, :, rows].transpose(0, 1)  # [rows, num_heads, head_dim]
        num_kv_heads = keys.shape[2]
        q = q.reshape(
            len(q), num_kv_heads, -1, q.shape[-1]
        )  # the heads of a group share one key: treat them as queries
        pages = paged.page_table[rows, : _width(paged, rows)]
        k, v = (_gather(pool, pages).to(query.dtype) for pool in (keys, values))
        k, v, mask = _isolated(k, v, _mask(paged, rows, asked.window))
        out = _attention(q, k, v, mask, asked)
        parts.append(out.flatten(1, 2))
    start = paged.num_decodes
    for index in range(paged.num_decodes, len(paged.num_queries)):
        rows = slice(index, index + 1)
        end = start + paged.num_queries[index]
        pages = paged.page_table[rows, : _width(paged, rows)]
        k, v = (_gather(pool, pages).to(query.dtype) for pool in (keys, values))
        k, v, mask = _isolated(k, v, _mask(paged, rows, asked.window))
        k, v = (_repeat(x, query.shape[1]) for x in (k, v))
        out = _attention(query[:, :, start:end], k, v, mask, asked)
        parts.append(out[0].transpose(0, 1))
        start = end
    return torch.cat(parts)[None], None


def asked_by(module: nn.Module, mask: Tensor | None, paged: PagedBatch) -> LayerAttention:
    """What the layer asks for. Raises ValueError for a mask, of which `probe` has seen none."""
    if mask is not None:
        raise ValueError(f"{type(module).__name__} makes masks of its own, which can't be served")
    return paged.layers[int(module.layer_idx)]  # type: ignore[arg-type]


def store(module: nn.Module, key: Tensor, value: Tensor, paged: PagedBatch) -> tuple[Tensor, Tensor]:
    """Write the step's keys and values, [1, num_kv_heads, T, head_dim], to the layer's pool; returns the pool."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    for pool, new in ((paged.keys[layer], key), (paged.values[layer], value)):
        limit = torch.finfo(pool.dtype).max
        if limit < torch.finfo(new.dtype).max:
            new = new.clamp(-limit, limit)
        new = new.to(pool.dtype)
        _bytes_of(pool).flatten(0, 1).index_copy_(0, paged.slots, _bytes_of(new[0].transpose(0, 1)))
    return paged.keys[layer], paged.values[layer]


def _bytes_of(x: Tensor) -> Tensor:
    """Numbers of 8 bits as integers, as torch moves floats of 8 bits on few devices; others as they are."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _width(paged: PagedBatch, rows: slice) -> int:
    return -(-max(paged.context_lens[rows]) // paged.keys[0].shape[1])


def _gather(pool: Tensor, pages: Tensor) -> Tensor:
    """[rows, num_pages] page numbers to [rows, num_kv_heads, num_pages × page_size, head_dim]."""
    return _bytes_of(pool)[pages].view(pool.dtype).flatten(1, 2).transpose(1, 2)


def _repeat(x: Tensor, num_heads: int) -> Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _mask(paged: PagedBatch, rows: slice, window: int | None) -> Tensor:
    """Which places each query token may see; [rows, 1, query tokens, width × page_size] bool."""
    if (rows.start, window) not in paged.masks:
        num_queries = paged.num_queries[rows.start]
        device = paged.slots.device
        places = torch.arange(_width(paged, rows) * paged.keys[0].shape[1], device=device)
        ends = paged.contexts[rows, None] - torch.arange(num_queries - 1, -1, -1, device=device)
        position = ends[:, None, :, None] - 1
        seen = places <= position
        if window is not None:
            seen &= places > position - window
        paged.masks[rows.start, window] = seen
    return paged.masks[rows.start, window]


def _isolated(k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values without what is not finite, and the mask to add to scores, which is NaN in its place: 0 × NaN
    is NaN, so that it would reach the queries that don't see it too.

    k, v: [rows, num_kv_heads, places, head_dim]; seen: [rows, 1, query tokens, places] bool.
    """
    sound = (k.isfinite() & v.isfinite()).all(dim=-1, keepdim=True).all(dim=1, keepdim=True)
    k, v = (torch.where(sound, x, 0.0) for x in (k, v))
    return k, v, torch.where(seen, torch.where(sound, 0.0, torch.nan).transpose(-1, -2), -torch.inf)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, asked: LayerAttention) -> Tensor:
    """mask: float32, to be added to the scores."""
    if asked.softcap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), scale=asked.scaling)
    scores = asked.softcap * torch.tanh(q @ k.transpose(-1, -2) * asked.scaling / asked.softcap)
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v
