"""The CPU backend: kernels.cpp reads the pages of each query token's row, without masks, gathers and padding."""

import ctypes

import torch
from torch import Tensor, nn

from linalign.alignment_core.attention.paged_batch import PagedBatch
from linalign.alignment_core.attention.sdpa import asked_by, store
from linalign.alignment_core.cpu.kernels import Batch, library

NAME = "linalign_native"


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
    """As `sdpa.attend`, for float32 on a CPU."""
    layer, (keys, values) = asked_by(module, attention_mask, paged), store(module, key, value, paged)
    queries = query[0].transpose(0, 1).contiguous()
    out = torch.empty_like(queries)
    lib = library()
    assert lib is not None
    lib.linalign_attention(
        ctypes.byref(native_batch(paged)),
        query.shape[1],
        key.shape[1],
        query.shape[-1],
        layer.scaling,
        layer.window or 0,
        layer.softcap or 0.0,
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out[None], None


def native_batch(paged: PagedBatch) -> Batch:
    """The step as the C struct of the kernels. It holds pointers into `paged`, which must outlive it."""
    return Batch(
        len(paged.row),
        paged.keys[0].shape[1],
        paged.page_table.shape[1],
        paged.row.data_ptr(),
        paged.position.data_ptr(),
        paged.page_table.data_ptr(),
        paged.slots.data_ptr(),
    )
