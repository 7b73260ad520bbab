"""The code for CUDA on a CPU: Triton's interpreter runs the kernels."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AttentionInterface

from linalign import EngineConfig
from linalign.alignment_core.attention import paged_triton
from linalign.alignment_core.attention.paged_batch import Plan
from linalign.alignment_core.execution import model_runner
from linalign.alignment_core.execution.batch_invariant import ROWS, in_blocks, run_in_blocks
from linalign.alignment_core.execution.cuda_graphs import padded_size
from linalign.alignment_core.execution.model_runner import compile_layers
from linalign.alignment_core.memory import pages_that_fit
from linalign.alignment_core.scheduling.scheduler import Row
from linalign.alignment_core.scheduling.sequence import Branch
from tests.counts import counted
from tests.engines import (
    ARCHITECTURES,
    GREEDY,
    PROGRAMS,
    SMALL,
    aligned,
    judge,
    make_engine,
    prompts,
    run_all,
    tiny_pair,
    token_ids,
)

pytestmark = pytest.mark.slow

ON_TRITON = SMALL | {"num_hidden_layers": counted(2, 3)}


@pytest.fixture
def on_triton(monkeypatch):
    """Makes the engine choose Triton as if there were CUDA. Returns a list of the attention's calls (their options)."""
    calls = []

    def attend(*args, **options):
        calls.append(options)
        return paged_triton.attend(*args, **options)

    monkeypatch.setattr(paged_triton, "PROGRAMS", PROGRAMS)
    monkeypatch.setattr(model_runner, "_choose_backend", lambda _: paged_triton.NAME)
    AttentionInterface.register(paged_triton.NAME, attend)
    return calls


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(tokenizer, model_type, on_triton):
    """Prompts in chunks beside decodes, decodes in fixed shapes, and one preempted sequence."""
    changes = {**ON_TRITON, **ARCHITECTURES[model_type]}
    loaded, oracle = tiny_pair(tokenizer, model_type, kernels=False, **changes)
    engine = make_engine(loaded, static=True, page_size=8, num_pages=14, max_num_batched_tokens=40)
    requests = [(prompt, replace(GREEDY, max_tokens=6)) for prompt in (aligned(2.0, 20), aligned(0, 35, 3))]
    for (prompt, _), outputs in zip(requests, run_all(engine, requests), strict=True):
        assert len(judge(oracle, prompt, outputs)) == 6
    assert loaded.model.config._attn_implementation == paged_triton.NAME
    assert engine.pool.num_free == engine.pool.num_pages
    assert engine.scheduler.num_preemptions
    assert engine.runner.graphs.num_runs >= 4
    windows = {layer.window for call in on_triton for layer in call["paged"].layers.values()}
    assert (windows != {None}) == ("sliding_window" in ARCHITECTURES[model_type])
    assert any(call.get("softcap") for call in on_triton) == (model_type == "gemma2")


@pytest.mark.usefixtures("on_triton")
def test_compiled_layers_equal_the_oracle(tokenizer):
    loaded, oracle = tiny_pair(tokenizer, kernels=False, **ON_TRITON)
    compile_layers(loaded.model)
    engine = make_engine(loaded, static=True, num_pages=400)
    torch._dynamo.utils.counters.clear()
    params = replace(GREEDY, max_tokens=4)
    for prompt, outputs in zip(prompts()[:2], run_all(engine, [(p, params) for p in prompts()[:2]]), strict=True):
        judge(oracle, prompt, outputs)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run_all(engine, [(aligned(2.0, 20, i), params) for i in range(4)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before  # no new graph for another number of rows


# Three kinds of layers; the long run compiles the other families too.
COMPILED = ("llama", "gemma2", "phi3")


@pytest.mark.parametrize(
    "model_type",
    [name if name in COMPILED else pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES],
)
def test_layers_are_compiled_at_the_start_and_never_again(tokenizer, model_type, monkeypatch):
    """One graph serves any number of layers, rows and tokens. The only graph break is at the attention.

    The kernels are no-ops here: the tests above check what layers compute.
    """
    monkeypatch.setattr(model_runner, "_choose_backend", lambda _: paged_triton.NAME)
    AttentionInterface.register(paged_triton.NAME, paged_triton.attend)
    for name in ("_attend_kernel", "_combine_kernel"):
        monkeypatch.setattr(paged_triton, name, defaultdict(lambda: lambda *_, **__: None))
    num_layers = torch._dynamo.config.recompile_limit + 1  # one graph per layer would exceed torch's limit
    changes = {"vocab_size": 300, "num_hidden_layers": num_layers, **ARCHITECTURES[model_type]}
    loaded, _ = tiny_pair(tokenizer, model_type, kernels=False, **changes)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(loaded.model, "aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        engine = make_engine(loaded, static=True, num_pages=400, max_num_seqs=2, max_num_batched_tokens=40)
        engine.runner._static.warm_up()
        counters = torch._dynamo.utils.counters
        compiled = counters["stats"]["unique_graphs"]
        assert compiled
        for length, company in ((20, 0), (45, 1), (70, 2)):
            requests = [(aligned(2.0, length), replace(GREEDY, max_tokens=3))] * (1 + company)
            run_all(engine, requests)
            assert counters["stats"]["unique_graphs"] == compiled
    (reason,) = counters["graph_break"]
    assert "function attend" in reason


def test_padded_sizes():
    assert [padded_size(n) for n in (1, 2, 3, 4, 5, 8, 9, 120, 121, 128, 129, 500)] == [
        1, 2, 4, 4, 8, 8, 16, 120, 128, 128, 160, 512,
    ]  # fmt: skip


def test_padding_changes_no_row_and_writes_to_an_unused_page():
    rows = [Row(Branch(tokens=[5, 6, 7], pages=[3]), 2, 3), Row(Branch(tokens=[8] * 9, pages=[1, 0]), 8, 9)]
    plan = Plan.of(rows, [(row, -1) for row in rows], page_size=8)
    assert plan.is_decode
    padded = plan.padded(4, spare_page=7, page_size=8)
    assert padded.token_ids.tolist() == [7, 8, 0, 0]
    assert padded.slots.tolist() == [26, 0, 56, 56]
    assert padded.page_table.tolist() == [[3, 0], [1, 0], [7, 7], [7, 7]]
    assert padded.context_lens == [3, 9, 1, 1]
    assert not Plan.of([Row(Branch(tokens=[5, 6, 7], pages=[3]), 1, 3)], [], 8).is_decode


@pytest.mark.usefixtures("on_triton")
def test_blocks_make_a_row_independent_of_other_rows(tokenizer):
    loaded, oracle = tiny_pair(tokenizer, kernels=False, **ON_TRITON)
    run_in_blocks(loaded.model)
    for layer in loaded.model.model.layers:  # on a CPU, torch rounds the ends of vectors differently
        layer.mlp.act_fn.forward = in_blocks(layer.mlp.act_fn.forward)
    seen = []
    for others in (0, counted(4, 7)):
        engine = make_engine(loaded, num_pages=400)
        logits = []
        forward = engine.runner.forward

        def spy(step, forward=forward, logits=logits):
            result = forward(step)
            logits.append(result[:2].clone())
            return result

        engine.runner.forward = spy
        requests = [(aligned(2.0), GREEDY)] + [(prompt, GREEDY) for prompt in (prompts() * 2)[:others]]
        outputs = run_all(engine, requests)
        judge(oracle, aligned(2.0), outputs[0])
        seen.append(torch.stack(logits[:12]))
    assert torch.equal(*seen)


@pytest.mark.usefixtures("on_triton")
def test_blocks_without_rows(tokenizer):
    """A chunk of a prompt that needs no logits has zero rows for the head."""
    loaded, oracle = tiny_pair(tokenizer, kernels=False, vocab_size=300)
    run_in_blocks(loaded.model)
    engine = make_engine(loaded, num_pages=100, max_num_batched_tokens=20)
    prompt, params = aligned(2.0, 40), replace(GREEDY, max_tokens=3)
    (outputs,) = run_all(engine, [(prompt, params)])
    assert engine.runner.num_forwards > 5
    judge(oracle, prompt, outputs)


def test_blocks_are_for_linear_layers():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))

    with pytest.raises(ValueError, match="Odd"):
        run_in_blocks(torch.nn.Sequential(Odd()))


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1])
def test_blocks_have_one_size(rows):
    sizes = []

    def forward(x):
        sizes.append(len(x))
        return x * 2

    x = torch.randn(1, rows, 3, 5)
    assert torch.equal(in_blocks(forward)(x), x * 2)
    assert set(sizes) == {ROWS}


@pytest.mark.parametrize(("name", "dtype"), [("fp8", torch.float8_e4m3fn), ("bfloat16", torch.bfloat16)])
def test_keys_and_values_may_have_a_smaller_dtype(tokenizer, name, dtype, monkeypatch):
    monkeypatch.setattr(model_runner, "library", lambda: None)
    loaded, _ = tiny_pair(tokenizer, kernels=False, vocab_size=300, initializer_range=0.1)
    logits = []
    for kv_cache_dtype in ("auto", name):
        engine = make_engine(loaded, num_pages=100, kv_cache_dtype=kv_cache_dtype)
        assert engine.runner._keys[0].dtype == (torch.float32 if kv_cache_dtype == "auto" else dtype)
        engine.submit(aligned(0, 60), GREEDY, print)
        engine._empty_inbox()
        logits.append(engine.runner.forward(engine.scheduler.schedule()).log_softmax(-1))
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum()
    assert 0 < divergence < 0.02


def test_the_cpu_kernels_support_only_float32_keys(tiny):
    with pytest.raises(ValueError, match="float32"):
        make_engine(tiny[0], num_pages=10, kv_cache_dtype="fp8")


def test_a_seed_gives_the_same_tokens_as_without_fixed_shapes(tiny):
    loaded, _ = tiny
    wanted = [
        (prompt, replace(GREEDY, seed=seed, **filters))
        for seed, (prompt, filters) in enumerate(
            zip(
                prompts(),
                [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0, "top_k": 5}] * 2,
                strict=True,
            )
        )
    ]
    replies = [
        [token_ids(outputs) for outputs in run_all(make_engine(loaded, num_pages=400, static=static), wanted)]
        for static in (False, True)
    ]
    assert replies[0] == replies[1]


def test_on_a_cpu_the_file_cache_counts_as_free_memory(monkeypatch):
    """With a large file cache hardly any memory is free, but nearly all of it is available."""
    memory = SimpleNamespace(free=1000, available=4 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    runner = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")), page_size=4, page_bytes=lambda: 1 << 20)
    assert pages_that_fit(runner, EngineConfig(), 16, 99) == 1024
    memory.available = 1 << 30
    assert pages_that_fit(runner, EngineConfig(), 16, 99) == 512


def test_the_pool_gets_the_memory_after_weights_and_a_full_step(monkeypatch):
    """The device is simulated, because a CPU has no such memory."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 5000))
    profiled = []

    def activation_bytes(num_tokens, num_wanted, draw):
        profiled.append((num_tokens, num_wanted))
        draw(torch.randn(num_wanted, 50))
        return 200

    runner = SimpleNamespace(
        model=SimpleNamespace(device=torch.device("cuda")),
        config=SimpleNamespace(max_rows=12),
        page_size=4,
        page_bytes=lambda: 10,
        activation_bytes=activation_bytes,
    )
    assert pages_that_fit(runner, EngineConfig(gpu_memory_utilization=0.5), 16, 99) == 40
    assert profiled == [(99, 12)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (205, 5000))
    with pytest.raises(ValueError, match="memory"):
        pages_that_fit(runner, EngineConfig(), 16, 99)
