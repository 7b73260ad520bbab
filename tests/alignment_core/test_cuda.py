"""What is made for CUDA, as far as a CPU goes: the same code around a plain version of torch's flash attention."""

from dataclasses import replace

import pytest
import torch

from alignment_core import model_runner
from alignment_core.attention import varlen
from alignment_core.attention.paged_batch import Plan
from alignment_core.batch_invariant import ROWS, in_blocks, run_in_blocks
from alignment_core.cuda_graphs import padded_size
from alignment_core.model_runner import compile_layers
from alignment_core.scheduler import Row
from alignment_core.sequence import Branch
from tests.alignment_core.test_engine import ARCHITECTURES, GREEDY, aligned, judge, prompts
from tests.conftest import make_engine, run_all, tiny_pair, token_ids

CPU = torch.device("cpu")


def plain_varlen(
    query,
    keys,
    values,
    query_ends,
    key_ends,
    max_queries,
    max_context,
    *,
    scale=None,
    window_size,
    enable_gqa,
    seqused_k,
    block_table,
    num_splits=None,
):
    """torch's documented contract, row by row; a context ends with its row's last query."""
    assert key_ends is None
    assert enable_gqa
    assert window_size[1] == 0
    assert query_ends.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert int(seqused_k.max()) <= max_context
    assert num_splits in (None, 1)
    out = torch.empty_like(query)
    for row, context in enumerate(seqused_k.tolist()):
        start, end = query_ends[row : row + 2].tolist()
        assert end - start <= max_queries
        k, v = (pool[block_table[row].long()].flatten(0, 1)[:context] for pool in (keys, values))
        k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (k, v))
        distance = torch.arange(context - (end - start), context)[:, None] - torch.arange(context)
        seen = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        scores = torch.einsum("qhd,khd->hqk", query[start:end], k) * (scale or query.shape[-1] ** -0.5)
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    return out


@pytest.fixture
def flash(monkeypatch):
    """As if there were CUDA; returns the calls."""
    calls = []

    def kernel(*args, **options):
        calls.append(options)
        return plain_varlen(*args, **options)

    monkeypatch.setattr(varlen, "kernel", lambda: kernel)
    monkeypatch.setattr(model_runner, "_choose_backend", lambda _, config: (varlen.NAME, config.page_size or 16))
    return calls


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name != "gemma2"])
def test_architectures(tokenizer, model_type, static, flash):
    loaded, oracle = tiny_pair(tokenizer, model_type, kernels=False, vocab_size=300, **ARCHITECTURES[model_type])
    for config in ({"num_pages": 400}, {"page_size": 4, "num_pages": 45, "max_num_batched_tokens": 9}):
        engine = make_engine(loaded, static=static, **config)
        for prompt, outputs in zip(prompts(), run_all(engine, [(prompt, GREEDY) for prompt in prompts()]), strict=True):
            judge(oracle, prompt, outputs)
        assert loaded.model.config._attn_implementation == varlen.NAME
        assert engine.pool.num_free == engine.pool.num_pages
        if static:
            assert engine.runner.graphs.num_runs > 20
    assert ((7, 0) in {call["window_size"] for call in flash}) == ("sliding_window" in ARCHITECTURES[model_type])


@pytest.mark.usefixtures("flash")
def test_a_soft_cap_is_not_for_flash_attention(tokenizer):
    loaded, _ = tiny_pair(tokenizer, "gemma2", kernels=False, vocab_size=300, **ARCHITECTURES["gemma2"])
    with pytest.raises(ValueError, match="soft cap"):
        make_engine(loaded, num_pages=10)


def test_the_smallest_page_that_works_is_found(monkeypatch):
    def kernel(*args, **options):
        if args[1].shape[1] % 64:
            raise RuntimeError("page size must be a multiple of 64")
        return plain_varlen(*args, **options)

    monkeypatch.setattr(varlen, "kernel", lambda: kernel)
    assert varlen.smallest_page(8, 2, 64, torch.float32, CPU) == 64

    def wrong(*args, **options):
        return plain_varlen(*args, **{**options, "block_table": options["block_table"].flip(1)})

    monkeypatch.setattr(varlen, "kernel", lambda: wrong)
    assert varlen.smallest_page(8, 2, 64, torch.float32, CPU) == 0
    monkeypatch.undo()
    assert varlen.smallest_page(8, 2, 64, torch.float32, CPU) == 0  # torch's own has no CPU kernel


@pytest.mark.usefixtures("flash")
def test_compiled_layers_equal_the_oracle(tokenizer):
    loaded, oracle = tiny_pair(tokenizer, kernels=False, vocab_size=300)
    compile_layers(loaded.model)
    engine = make_engine(loaded, static=True, num_pages=400)
    torch._dynamo.utils.counters.clear()
    for prompt, outputs in zip(prompts(), run_all(engine, [(prompt, GREEDY) for prompt in prompts()]), strict=True):
        judge(oracle, prompt, outputs)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run_all(engine, [(aligned(2.0, 50, 3), GREEDY)] * 9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before  # whatever the number of rows


def test_padded_sizes():
    assert [padded_size(n) for n in (1, 2, 3, 4, 5, 8, 9, 120, 121, 128, 129, 500)] == [
        1, 2, 4, 4, 8, 8, 16, 120, 128, 128, 160, 512,
    ]  # fmt: skip


def test_padding_changes_no_row_and_writes_to_nobodys_page():
    rows = [Row(Branch(tokens=[5, 6, 7], pages=[3]), 2, 3), Row(Branch(tokens=[8] * 9, pages=[1, 0]), 8, 9)]
    plan = Plan.of(rows, [(row, -1) for row in rows], page_size=8)
    assert plan.is_decode
    padded = plan.padded(4, 3, spare_page=7, page_size=8)
    assert padded.token_ids.tolist() == [7, 8, 0, 0]
    assert padded.slots.tolist() == [26, 0, 56, 56]
    assert padded.page_table.tolist() == [[3, 0, 7], [1, 0, 7], [7, 7, 7], [7, 7, 7]]
    assert padded.context_lens == [3, 9, 1, 1]
    assert not Plan.of([Row(Branch(tokens=[5, 6, 7], pages=[3]), 1, 3)], [], 8).is_decode


@pytest.mark.usefixtures("flash")
def test_blocks_make_a_row_independent_of_its_company(tokenizer):
    loaded, oracle = tiny_pair(tokenizer, kernels=False, vocab_size=300)
    run_in_blocks(loaded.model)
    for layer in loaded.model.model.layers:  # on a CPU the ends of vectors are computed, and round, otherwise
        layer.mlp.act_fn.forward = in_blocks(layer.mlp.act_fn.forward)
    seen = []
    for others in (0, 7):
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
def test_keys_and_values_may_have_fewer_bits(tokenizer, name, dtype, monkeypatch):
    monkeypatch.setattr(model_runner, "library", lambda: None)
    loaded, _ = tiny_pair(tokenizer, kernels=False, vocab_size=300, initializer_range=0.1)
    logits = []
    for kv_cache_dtype in ("auto", name):
        engine = make_engine(loaded, num_pages=100, kv_cache_dtype=kv_cache_dtype)
        assert engine.runner._keys[0].dtype == (torch.float32 if kv_cache_dtype == "auto" else dtype)
        engine.submit(aligned(0, 60), GREEDY, print)
        engine._take_in()
        logits.append(engine.runner.forward(engine.scheduler.schedule()).log_softmax(-1))
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum()
    assert 0 < divergence < 0.02


def test_a_cpus_kernels_have_float32_keys_alone(tiny):
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
