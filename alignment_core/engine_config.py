"""The sizes of an engine. Free of torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes. None: a default that depends on the model, the device or the free memory.

    max_model_len: tokens of the longest branch, reply included.
    max_num_seqs: sequences that run at once.
    max_num_batched_tokens: query tokens of one forward pass. Running streams wait for each pass. None: 128 on a CPU,
    where larger passes take hardly less time per token, and 2048 on a GPU.
    num_pages × page_size: tokens in the KV cache, all branches together.
    gpu_memory_utilization: share of the GPU memory that weights and steps leave, for the KV cache.
    kv_cache_dtype: auto (the model's), float32, bfloat16, float16 or fp8 (e4m3, without a scale).
    num_speculative_tokens: the longest draft of prompt lookup; 0 disables drafts. None: 8 on a GPU,
    and 0 on a CPU, where every row costs time.
    batch_invariant: replies do not depend on the rest of the batch. This is always the case on a CPU.
    static: decodes run in a few fixed shapes (CUDA graphs), the device draws the tokens, and every step is
    launched before those of the previous step are known, so that the device need not wait for the host. None:
    only on a GPU.
    enforce_eager: neither CUDA graphs nor torch.compile.
    max_queued_requests, max_queued_tokens: choices, and prompt tokens of all their branches, that may wait for
    their first step; None for any number. One request is always accepted.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    num_speculative_tokens: int | None = None
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = "auto"
    batch_invariant: bool = False
    static: bool | None = None
    enforce_eager: bool = False
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
