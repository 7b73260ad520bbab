"""The Triton kernels: run by Triton's interpreter and compared with plain attention, and compiled for real GPUs."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from linalign.alignment_core.attention import paged_triton
from linalign.alignment_core.attention.paged_batch import LayerAttention, PagedBatch, Plan
from linalign.alignment_core.scheduling.scheduler import Row
from linalign.alignment_core.scheduling.sequence import Branch
from tests.counts import counted

pytestmark = pytest.mark.slow

CONTEXTS = [
    (70, 1),
    (1, 1),
    (130, 1),
    (90, 33),
    (40, 40),
    (199, 5),
]  # (tokens of a row, how many of them are queries)
FEW = counted([(70, 1), (1, 1), (130, 1), (199, 5)], CONTEXTS)


def written_out(query, keys, values, row, num_queries, scaling, window, softcap):
    """Plain attention in float64. query: [num_heads, T, head_dim] of one row. Returns [T, num_heads, head_dim]."""
    pages, context = torch.tensor(row.branch.pages), row.end
    k, v = (pool[pages].flatten(0, 1)[:context].double() for pool in (keys, values))
    k, v = (x.repeat_interleave(len(query) // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("hqd,khd->hqk", query.double(), k) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(context - num_queries, context)[:, None] - torch.arange(context)
    seen = (distance >= 0) & (distance < (window or context))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def attend(
    contexts, heads, kv_heads, dim, page_size=16, window=None, softcap=None, dtype=torch.float32, kv=None, **batch
):
    """Run the kernels on rows with these contexts; each (context, num_queries) always gets the same random numbers.

    Returns the kernels' result [T, heads, dim], the plain attention's result, and the batch.
    """
    generator = torch.Generator().manual_seed(0)
    num_pages = sum(-(-context // page_size) for context, _ in CONTEXTS)
    free = torch.randperm(num_pages, generator=generator).tolist()
    rows = {}
    for context, num_queries in CONTEXTS:
        pages = [free.pop() for _ in range(-(-context // page_size))]
        rows[context, num_queries] = Row(Branch(tokens=[0] * context, pages=pages), context - num_queries, context)
    shape = (num_pages, page_size, kv_heads, dim)
    keys, values = (torch.randn(shape, generator=generator).to(kv or dtype) for _ in range(2))
    new = {
        chosen: [torch.randn(n, num_queries, dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads)]
        for chosen, (_, num_queries) in zip(rows, CONTEXTS, strict=True)
    }
    plan = Plan.of([rows[chosen] for chosen in contexts], [], page_size)
    ordered = sorted(contexts, key=lambda chosen: chosen[1] > 1)  # the order of Plan.of
    query, key, value = (torch.cat([new[chosen][i] for chosen in ordered], dim=1)[None] for i in range(3))
    paged = PagedBatch.of(plan, [keys], [values], {0: LayerAttention(dim**-0.5, window, softcap)}, **batch)
    out, _ = paged_triton.attend(SimpleNamespace(layer_idx=0), query, key, value, None, paged=paged)
    wanted = [
        written_out(new[chosen][0], keys, values, rows[chosen], chosen[1], dim**-0.5, window, softcap)
        for chosen in ordered
    ]
    return out[0], torch.cat(wanted), paged


@pytest.fixture
def grids(monkeypatch):
    """The grids with which the attention kernel was launched."""
    seen = []

    class Spy:
        def __getitem__(self, grid):
            seen.append(grid)
            return kernel[grid]

    kernel = paged_triton._attend_kernel
    monkeypatch.setattr(paged_triton, "_attend_kernel", Spy())
    return seen


SPLIT = 100
# The interpreter needs seconds to combine the parts of long chunks: the short run does so for these shapes only.
LONG_CHUNKS = (
    {"heads": 4, "kv_heads": 2, "dim": 8},
    {"heads": 4, "kv_heads": 2, "dim": 64, "window": 64, "softcap": 5.0},
)


@pytest.mark.parametrize("programs", [1, SPLIT])
@pytest.mark.parametrize(
    "shape",
    [
        LONG_CHUNKS[0],
        {"heads": 6, "kv_heads": 2, "dim": 32, "page_size": 3},
        {"heads": 4, "kv_heads": 2, "dim": 64, "window": 7},
        LONG_CHUNKS[1],
        {"heads": 3, "kv_heads": 3, "dim": 80, "softcap": 5.0},
        {"heads": 32, "kv_heads": 1, "dim": 256, "page_size": 32},
        {"heads": 4, "kv_heads": 2, "dim": 64, "dtype": torch.float16, "window": 100},
        {"heads": 4, "kv_heads": 2, "dim": 64, "dtype": torch.float16, "kv": torch.float8_e4m3fn},
        {"heads": 4, "kv_heads": 2, "dim": 64, "kv": torch.bfloat16},
    ],
    ids=str,
)
def test_the_kernel_equals_attention_in_float64(shape, programs, grids, monkeypatch):
    monkeypatch.setattr(paged_triton, "PROGRAMS", programs)
    contexts = FEW if programs == SPLIT and shape not in LONG_CHUNKS else CONTEXTS
    out, wanted, _ = attend(contexts, **shape)
    tolerance = 2e-6 if shape.get("dtype") is None else 2e-3
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
    assert len(grids) == 2  # one launch for decodes, one for all other rows
    assert len({grid[2] for grid in grids}) == 1
    assert (grids[0][2] > 1) == (programs > 1)


@pytest.mark.parametrize("window", [None, 50])
def test_a_token_is_the_same_in_any_batch(window, monkeypatch):
    """With batch_invariant, bit for bit in any tile. Without it, contexts are split depending on the number of rows."""
    monkeypatch.setattr(paged_triton, "PROGRAMS", 40)
    decode, chunk, end = CONTEXTS[2], CONTEXTS[3], CONTEXTS[5]
    shape = {"heads": 4, "kv_heads": 2, "dim": 64, "window": window}
    differs = 0
    for batch_invariant in (True, False):
        crowd, _, paged = attend(CONTEXTS, **shape, batch_invariant=batch_invariant)
        assert paged.num_queries == [1, 1, 1, 33, 40, 5]
        for chosen, place in ((decode, slice(2, 3)), (chunk, slice(3, 36)), (end, slice(76, 81))):
            alone, _, _ = attend([chosen], **shape, batch_invariant=batch_invariant)
            if batch_invariant:
                assert torch.equal(alone, crowd[place])
            else:
                differs += not torch.equal(alone, crowd[place])
    assert differs or window


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from linalign.alignment_core.attention import paged_triton

def compile(kernel, arch, constants, **pointers):
    types = {name: "*" + pointers[name] if name in pointers else "constexpr" if name in constants
        else "fp32" if name in ("scaling", "softcap") else "i32" if name.endswith("stride") else "*i32"
        for name in kernel.arg_names}
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, types, {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in types if types[name][0] == "*" or types[name] == "i32"})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))

for arch, dtype, kv, dim, lines in json.loads(sys.argv[1]):
    splits = 4 if lines == paged_triton.DECODE_LINES else 1
    keys = paged_triton.keys_of_a_block(dim, {"fp32": 4, "bf16": 2}[dtype])
    constants = dict(WINDOW=64, SOFTCAP=True, PAGE_SIZE=16, GROUP=4, HEAD_DIM=dim, PADDED_DIM=dim, LINES=lines,
        KEYS=keys, SPLITS=splits, PRECISION="ieee" if dtype == "fp32" else None)
    parts = "fp32" if splits > 1 else dtype
    compiled = compile(paged_triton._attend_kernel, arch, constants, queries=dtype, keys=kv, values=kv, parts=parts,
        logs=parts)
    ptx = compiled.asm["ptx"]
    print(json.dumps([compiled.metadata.shared, len(compiled.asm["cubin"]), "cp.async" in ptx, "mma" in ptx]))
    compile(paged_triton._combine_kernel, arch, dict(HEAD_DIM=dim, PADDED_DIM=dim, SPLITS=4), parts="fp32", logs="fp32",
        out=dtype)
"""
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block, by architecture


def test_compiles_for_gpus_and_fits_them():
    """Compiles to machine code, which needs no GPU, for A100, L4, H200 and B200."""
    decode, other = paged_triton.DECODE_LINES, paged_triton.LINES
    cases = [
        (arch, "bf16", "bf16", *size) for arch in SHARED_MEMORY for size in ((128, decode), (128, other), (256, other))
    ]
    cases += [(90, "bf16", "fp8e4nv", 64, decode), (90, "bf16", "fp8e4nv", 64, other), (80, "fp32", "fp32", 128, other)]
    cases += [(90, "fp32", kv, 32, decode) for kv in ("bf16", "fp16", "fp8e4nv")] + [(90, "bf16", "fp32", 32, decode)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(cases)], env=environment, text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    for (arch, dtype, *_), (shared, machine_code, copies_ahead, tensor_cores) in zip(cases, results, strict=True):
        assert shared <= SHARED_MEMORY[arch]
        assert machine_code
        assert copies_ahead
        assert tensor_cores == (dtype == "bf16")
