"""Attention alone, by backend; and prompt lookup with drafts that are accepted."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_measurements.bench import RATIO, Bench, finish, forget, start_decodes
from linalign import Prompt
from linalign.alignment_core.attention import sdpa
from linalign.alignment_core.attention.paged_batch import LayerAttention, PagedBatch, Plan
from linalign.alignment_core.scheduling.scheduler import Row
from linalign.alignment_core.scheduling.sequence import Branch


def attention(bench: Bench) -> dict[str, Any]:
    """Decode attention of one layer over a paged cache: our backends, and torch's if it supports pages.

    In GB of keys and values per second, for one aligned request and for many. Replayed from CUDA graphs, as in the
    engine, except for "gathered", which the engine never captures.
    """
    shape = bench.shape
    dtype, heads, kv_heads = torch.bfloat16, shape.model["num_attention_heads"], shape.model["num_key_value_heads"]
    dim = shape.model["hidden_size"] // heads
    context = shape.prompt + shape.principle + shape.reply
    measured: dict[str, Any] = {}
    for num_rows in (2, 2 * shape.many):
        for name, attend, page_size in backends(bench.on_cuda):
            num_pages = -(-context // page_size)
            pages = torch.randperm(num_rows * num_pages).view(num_rows, num_pages).tolist()
            rows = [Row(Branch([0] * context, own), context - 1, context) for own in pages]
            pool = [
                torch.randn(num_rows * num_pages, page_size, kv_heads, dim, device=bench.device, dtype=dtype)
                for _ in range(2)
            ]
            layers = {0: LayerAttention(dim**-0.5, None, None)}
            paged = PagedBatch.of(Plan.of(rows, [], page_size), *([part] for part in pool), layers)
            query, key, value = (
                torch.randn(1, n, num_rows, dim, device=bench.device, dtype=dtype) for n in (heads, kv_heads, kv_heads)
            )
            layer = torch.nn.Module()
            layer.layer_idx = 0  # type: ignore[assignment]

            def run() -> None:
                for _ in range(10):
                    attend(layer, query, key, value, None, paged=paged)  # noqa: B023

            label = f"attention, {num_rows} rows, {name}, GB/s"
            try:
                run()
                again = run if name == "gathered" else recorded(bench, run)
                seconds = statistics.median(bench.timed(again) for _ in range(5)) / 10
            except Exception as error:  # of one backend; a broken device is noticed at the end of the measurement
                measured[label] = f"{type(error).__name__}: {error}"
                continue
            measured[label] = 2 * num_rows * context * kv_heads * dim * dtype.itemsize / seconds / 1e9
    return measured


def recorded(bench: Bench, run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a graph replay, without the host's time; `run` itself on a CPU."""
    if not bench.on_cuda:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def backends(on_cuda: bool) -> Iterator[tuple[str, Any, int]]:
    """Name, function and page size of each backend that is available here."""
    yield "gathered", sdpa.attend, 16
    if not on_cuda:
        return
    from linalign.alignment_core.attention import paged_triton

    yield "Triton", paged_triton.attend, 16

    def attend_with_varlen(layer: Any, query: Any, key: Any, value: Any, _: None, *, paged: PagedBatch) -> None:
        from torch.nn.attention.varlen import varlen_attn  # in torch 2.11 it has no page table: raises TypeError

        keys, values = sdpa.store(layer, key, value, paged)
        varlen_attn(
            query[0].transpose(0, 1), keys, values, paged.query_ends, None, 1, max(paged.context_lens),
            scale=paged.layers[0].scaling, window_size=(-1, 0), enable_gqa=True, seqused_k=paged.contexts,
            block_table=paged.page_table,
        )  # fmt: skip

    yield "torch's varlen", attend_with_varlen, 256  # the smallest page that its Ampere kernels accept


def prompt_lookup(bench: Bench) -> dict[str, float]:
    """Seconds with and without drafts for a model that copies: after word n it always says word n + 1."""
    period, model = bench.shape.prompt, bench.loaded.model
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        words = torch.arange(10, 10 + period, device=bench.device)
        output[words.roll(-1)] = embedding[words]
    ids = tuple((i % period) + 10 for i in range(2 * period))
    prompt = Prompt(((*ids[:5], 5, 6, 7, *ids[5:]),), (1.0,), (RATIO,), ids)
    measured = {}
    for name, most in (("without drafts, s", 0), ("with drafts, s", 8)):
        engine = bench.new_engine(num_speculative_tokens=most, max_num_seqs=4, num_pages=2000)
        for _ in range(2):
            forget(engine)
            start_decodes(engine, [prompt], bench.shape.reply)
            measured[name] = bench.timed(lambda engine=engine: finish(engine))  # type: ignore[misc]
        if most:
            assert engine.stats().num_tokens_accepted > bench.shape.reply / 2
        del engine
        bench.tidy()
    return measured
