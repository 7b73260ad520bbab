"""The sizes of an engine. Free of torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes. None means: from the model and the memory at hand.

    max_model_len: tokens of the longest branch, reply included.
    max_num_seqs: sequences that run at once.
    max_num_batched_tokens: query tokens of one forward pass; streams stall for as long as it takes, so
    None means 128 on a CPU, where longer ones are not quicker by the token, and 2048 on a GPU.
    num_pages × page_size: tokens in the KV cache, all branches together.
    gpu_memory_utilization: share of the GPU memory that weights and steps leave, for the KV cache.
    kv_cache_dtype: auto (the model's), float32, bfloat16, float16 or fp8 (e4m3, without a scale).
    num_speculative_tokens: the longest draft of prompt lookup; 0 switches it off. None means 8 on a GPU
    and 0 on a CPU, where every row costs time.
    batch_invariant: a reply does not depend on what else is in the batch. Always so on a CPU.
    static: decodes run in a few fixed shapes (CUDA graphs), the device draws the tokens, and every step is
    launched before those of the previous step are known, so that the device never waits for the host. None
    means on a GPU.
    enforce_eager: neither CUDA graphs nor torch.compile.
    max_queued_requests, max_queued_tokens: choices, and prompt tokens of all their branches, that may wait for
    their first step; None for any number. One request is always let in.
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
