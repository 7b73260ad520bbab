"""The CUDA backend: flash attention over the page table, in Triton, without gathers and masks and for any page size.

In steps of few rows the contexts are split over many programs, and a second kernel combines the parts (Dao et al.,
"Flash-Decoding", 2023). All query heads that share a key head are lines of one matrix product. Why we have our own
kernel: docs/decisions/0008.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from linalign.alignment_core.attention.paged_batch import LayerAttention, PagedBatch
from linalign.alignment_core.attention.sdpa import asked_by, store

NAME = "linalign_triton"
PROGRAMS = 256  # about two for each multiprocessor; a step with fewer programs splits its contexts
MOST_SPLITS = 16  # parts of a context
DECODE_LINES, LINES = 16, 64  # lines (query tokens × heads) of a program
BLOCK_BYTES = 16384  # of the keys that a program loads at a time


@torch.compiler.disable  # torch must not compile the launches of these kernels
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
    """As `sdpa.attend`, on CUDA.

    The host reads no values from the device and, for decodes, no context lengths. So decodes can be captured in graphs.
    """
    layer, pool = asked_by(module, attention_mask, paged), store(module, key, value, paged)
    queries = query[0].transpose(0, 1)  # [T, num_heads, head_dim], any strides
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    # batch_invariant: all rows use tiles of one size, so that no result depends on the number of query tokens.
    decode_lines, lines = (
        max(least, triton.next_power_of_2(group)) for least in (LINES if paged.batch_invariant else DECODE_LINES, LINES)
    )
    launches = []
    if paged.num_decodes:
        rows = paged.counter[: paged.num_decodes]
        launches.append((decode_lines, rows, rows))
    if paged.num_decodes < len(paged.num_queries):
        launches.append((lines, *paged.tiles(lines // group)))
    programs = num_kv_heads * sum(len(rows) for _, rows, _ in launches)
    splits = 1
    if not paged.batch_invariant:
        splits = min(MOST_SPLITS, triton.next_power_of_2(max(1, PROGRAMS // programs)))
    out = queries.new_empty(queries.shape)
    parts, logs = out, out
    if splits > 1:
        parts = queries.new_empty((num_tokens, num_heads, splits, head_dim), dtype=torch.float32)
        logs = queries.new_empty((num_tokens, num_heads, splits), dtype=torch.float32)
    for launch in launches:
        _launch(queries, pool, parts, logs, paged, *launch, splits, layer)
    if splits > 1:
        padded_dim = triton.next_power_of_2(head_dim)
        _combine_kernel[num_tokens, num_heads](parts, logs, out, head_dim, padded_dim, splits)
    return out[None], None


def _launch(
    queries: Tensor,
    pool: tuple[Tensor, Tensor],
    parts: Tensor,
    logs: Tensor,
    paged: PagedBatch,
    lines: int,
    tile_rows: Tensor,
    tile_starts: Tensor,
    splits: int,
    layer: LayerAttention,
) -> None:
    """Launch the attention kernel for some tiles.

    parts: [T, num_heads, splits, head_dim], the output.
    logs: [T, num_heads, splits], output: the log of the softmax mass of each part. Not written if splits is 1.
    lines: Lines of a tile.
    tile_rows, tile_starts: [tiles] int32, the row of each tile, and the index of its first query token among all T.
    """
    keys, values = pool
    _, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[2]
    padded_dim = max(16, triton.next_power_of_2(head_dim))  # the smallest matrix product has 16
    _attend_kernel[len(tile_rows), num_kv_heads, splits](
        queries,
        keys,
        values,
        parts,
        logs,
        tile_rows,
        tile_starts,
        paged.query_ends,
        paged.contexts,
        paged.page_table,
        layer.scaling,
        layer.softcap or 1.0,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        paged.page_table.stride(0),
        WINDOW=layer.window or 0,
        SOFTCAP=layer.softcap is not None,
        PAGE_SIZE=keys.shape[1],
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        LINES=lines,
        KEYS=keys_of_a_block(padded_dim, queries.itemsize),
        SPLITS=splits,
        PRECISION="ieee" if queries.dtype == torch.float32 else None,
    )


def keys_of_a_block(padded_dim: int, itemsize: int) -> int:
    """Number of keys that a program loads at a time. Three such blocks, loading at once, fit into the shared memory."""
    return min(64, max(16, BLOCK_BYTES // (padded_dim * itemsize)))


@triton.jit(do_not_specialize=["table_stride"])
def _attend_kernel(
    queries,
    keys,
    values,
    parts,
    logs,
    tile_rows,
    tile_starts,
    query_ends,
    contexts,
    page_table,
    scaling,
    softcap,
    query_stride,
    query_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    table_stride,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    LINES: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one tile of a row's queries, for one key head and one part of the context.

    A line is a pair of a query token and a head.
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    QUERIES: tl.constexpr = LINES // GROUP
    row = tl.load(tile_rows + tile)
    first = tl.load(tile_starts + tile)
    end = tl.load(query_ends + row + 1)
    context = tl.load(contexts + row)
    line = tl.arange(0, LINES)
    token = first + line // GROUP
    head = kv_head * GROUP + line % GROUP
    valid = (token < end) & (line < QUERIES * GROUP)
    position = context - end + token
    dim = tl.arange(0, PADDED_DIM)
    in_head = dim < HEAD_DIM
    q = tl.load(
        queries + token[:, None].to(tl.int64) * query_stride + head[:, None] * query_head_stride + dim[None, :],
        mask=valid[:, None] & in_head[None, :],
        other=0.0,
    )

    stop = tl.minimum(context, context - end + first + QUERIES)
    start = 0
    if WINDOW > 0:
        start = (
            tl.maximum(0, context - end + first - WINDOW + 1) // KEYS * KEYS
        )  # block limits do not depend on the tile
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(stop - start, KEYS), SPLITS) * KEYS
        start = start + split * share
        stop = tl.minimum(stop, start + share)

    best = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    sums = tl.zeros([LINES, PADDED_DIM], tl.float32)
    for at in range(start, stop, KEYS):
        place = at + tl.arange(0, KEYS)
        in_range = place < stop
        page = tl.load(page_table + row * table_stride + place // PAGE_SIZE, mask=in_range, other=0).to(tl.int64)
        slot = page * page_stride + (place % PAGE_SIZE) * slot_stride + kv_head * head_stride
        k = tl.load(keys + slot[None, :] + dim[:, None], mask=in_range[None, :] & in_head[:, None], other=0.0)
        v = tl.load(values + slot[:, None] + dim[None, :], mask=in_range[:, None] & in_head[None, :], other=0.0)
        v = v.to(q.dtype)
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        # 0 × NaN is NaN, for queries that do not see the value too. Those that see it get NaN from the scores.
        v = tl.where(finite, v, 0.0)
        not_finite = tl.max(tl.where(finite, 0, 1), 1) > 0
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scaling
        if SOFTCAP:
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        scores = tl.where(not_finite[None, :], float("nan"), scores)
        seen = in_range[None, :] & (place[None, :] <= position[:, None])
        if WINDOW > 0:
            seen &= place[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        reference = tl.where(higher == float("-inf"), 0.0, higher)  # avoids −inf − −inf while a line has seen no key
        weights = tl.exp(scores - reference[:, None])
        shrink = tl.exp(best - reference)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision=PRECISION)
        best = higher

    total = tl.where(best == float("-inf"), 1.0, total)  # avoids 0 / 0 for a part without keys
    mean = sums / total[:, None]
    target = (token.to(tl.int64) * (tl.num_programs(1) * GROUP) + head) * SPLITS + split
    inside = valid[:, None] & in_head[None, :]
    tl.store(parts + target[:, None] * HEAD_DIM + dim[None, :], mean.to(parts.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        tl.store(logs + target, best + tl.log(total), mask=valid)


@triton.jit
def _combine_kernel(parts, logs, out, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Combine the parts of one query and head, weighted by their softmax masses."""
    target = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dim = tl.arange(0, PADDED_DIM)
    in_head = dim < HEAD_DIM
    best = float("-inf")
    for split in range(SPLITS):
        best = tl.maximum(best, tl.load(logs + target * SPLITS + split))
    total = 0.0
    sums = tl.zeros([PADDED_DIM], tl.float32)
    for split in range(SPLITS):
        weight = tl.exp(tl.load(logs + target * SPLITS + split) - best)
        part = tl.load(parts + (target * SPLITS + split) * HEAD_DIM + dim, mask=in_head, other=0.0)
        total += weight
        sums += weight * part
    tl.store(out + target * HEAD_DIM + dim, (sums / total).to(out.dtype.element_ty), mask=in_head)
