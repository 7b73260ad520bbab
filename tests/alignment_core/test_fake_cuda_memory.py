"""Memory of the fake device: how the engine divides it, what graphs overwrite in it, and when copies read it.

Each check is followed by a planted fault that it detects.
"""

from dataclasses import replace

import pytest
import torch

from linalign.alignment_core.execution import static_decodes
from linalign.alignment_core.execution.cuda_graphs import Graphs
from linalign.alignment_core.execution.model_runner import ModelRunner
from linalign.alignment_core.transfer import to_device
from tests.engines import aligned, judge, run_all
from tests.fake_cuda import CUDA, CudaTensor, FakeCuda, Fault
from tests.fake_cuda.engine import SHORT, WHERE_THE_HOST_WAITS, engine_on

pytestmark = pytest.mark.slow

pytest_plugins = ["tests.fake_cuda.fixtures"]

TOTAL = 4 << 20
SIZED = {"num_pages": None, "max_num_batched_tokens": 64, "max_num_seqs": 2, "model": {"num_hidden_layers": 1}}


# The number of pages


@pytest.fixture
def small(cuda):
    """A device with little memory."""
    cuda.memory.total = TOTAL
    return cuda


@pytest.fixture
def activations(monkeypatch):
    """The engine's measurements of the activation memory of a step, in bytes."""
    measured = []
    measure = ModelRunner.activation_bytes

    def spy(*args):
        measured.append(measure(*args))
        return measured[-1]

    monkeypatch.setattr(ModelRunner, "activation_bytes", spy)
    return measured


def expected_pages(engine, activation_bytes, share):
    """Pages that fit in `share` of the memory left by weights, the two pages of the first check and activations."""
    model, page_bytes = engine.runner.model, engine.runner.page_bytes()
    weights = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    return int((TOTAL - weights - 2 * page_bytes - activation_bytes) * share) // page_bytes


@pytest.mark.parametrize("share", [0.9, 0.3])
def test_the_kv_cache_has_its_share_of_free_memory(small, tokenizer, activations, share):
    engine, _ = engine_on(small, tokenizer, gpu_memory_utilization=share, **SIZED)
    (activation_bytes,) = activations
    assert engine.pool.num_pages == expected_pages(engine, activation_bytes, share)
    logits = engine.runner.logits[: engine.runner.config.max_rows]
    assert activation_bytes > 4 * logits.nbytes  # the model's logits, their float32 copy, and twice the draw's input


def test_the_largest_steps_fit_beside_the_kv_cache(small, tokenizer):
    """Even if pages take all remaining memory: captured and eager draws, with every filter."""
    engine, oracle = engine_on(small, tokenizer, gpu_memory_utilization=1.0, warm_up=True, **SIZED)
    filters = replace(SHORT, temperature=1.0, top_k=5, top_p=0.9)
    requests = [(aligned(2.0, 60), SHORT), (aligned(2.0, 50, 3), filters)]
    outputs, _ = run_all(engine, requests)
    assert len(judge(oracle, aligned(2.0, 60), outputs)) == 6
    assert set(small.waits) == WHERE_THE_HOST_WAITS  # no step was halved
    assert small.memory.free < TOTAL // 10


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (torch.cuda, "mem_get_info", lambda _: (16 * TOTAL, 32 * TOTAL)),
        (ModelRunner, "activation_bytes", lambda *_: 0),
    ],
    ids=["another memory, as the host's", "no activations"],
)
def test_a_kv_cache_that_is_too_large_is_detected(small, tokenizer, monkeypatch, module, name, fault):
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(torch.OutOfMemoryError):
        engine_on(small, tokenizer, gpu_memory_utilization=1.0, warm_up=True, **SIZED)


def test_memory_that_is_cached_during_the_measurement_is_counted(small, tokenizer, activations, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    engine, _ = engine_on(small, tokenizer, **SIZED)
    assert engine.pool.num_pages < expected_pages(engine, activations[0], 0.9)


@pytest.mark.usefixtures("small")
def test_memory_is_free_with_the_last_tensor_that_holds_it():
    x = torch.zeros(1000, device=CUDA)
    views = [x[10:], x.view(10, 100)]
    assert torch.cuda.memory_allocated() == 4000
    del x
    assert torch.cuda.memory_allocated() == 4000
    views.clear()
    assert (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) == (0, 4000)
    assert torch.cuda.mem_get_info() == (TOTAL - 4000, TOTAL)  # the freed bytes stay cached
    held = torch.zeros(TOTAL, dtype=torch.uint8, device=CUDA)  # the cache is emptied for it
    with pytest.raises(torch.OutOfMemoryError):
        held + 1
    del held
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.mem_get_info() == (TOTAL, TOTAL)
    assert torch.cuda.max_memory_allocated() == 0


# What graphs overwrite


def keeping_results(x, num_pools):
    """A function that runs the graph of a key and returns the results of all graphs so far, without copying them."""
    pools, results = [Graphs(CUDA) for _ in range(num_pools)], {}

    def run(key):
        def compute():
            results[key] = (x + 1) * 2  # x + 1 is freed at the end, so that later graphs reuse its memory

        pools[key % num_pools].run(key, compute)
        return {key: result.inner.tolist() for key, result in results.items()}

    return run


@pytest.mark.usefixtures("cuda")
def test_a_replay_overwrites_memory_of_later_graphs_in_its_pool():
    """Results of earlier graphs can't be overwritten as long as they are referenced."""
    run = keeping_results(CudaTensor(torch.ones(())), num_pools=1)
    assert run(0) == {0: 4}
    assert run(1) == {0: 4, 1: 4}
    assert str(run(0)) == "{0: 4.0, 1: nan}"
    assert run(1) == {0: 4, 1: 4}


@pytest.mark.usefixtures("cuda")
def test_graphs_of_two_pools_do_not_overwrite_each_other():
    run = keeping_results(CudaTensor(torch.ones(())), num_pools=2)
    for key in (0, 1, 0):
        results = run(key)
    assert results == {0: 4, 1: 4}


@pytest.mark.usefixtures("cuda")
def test_a_graph_that_frees_nothing_overwrites_nothing():
    x, graphs, results = CudaTensor(torch.ones(())), Graphs(CUDA), {}
    for key in (0, 1, 0):
        graphs.run(key, lambda: results.update({key: x + 1}))  # noqa: B023
    assert {key: result.inner.item() for key, result in results.items()} == {0: 2, 1: 2}


@pytest.mark.usefixtures("cuda")
def test_an_operand_that_is_freed_before_a_replay_is_detected():
    graphs, operands, out = Graphs(CUDA), [CudaTensor(torch.ones(2))], CudaTensor(torch.zeros(2))
    for _ in range(2):
        graphs.run("key", lambda: out.copy_(operands[0]))
    operands.clear()
    with pytest.raises(Fault, match=r"free by now, .*test_fake_cuda_memory\.py:\d+ in <lambda>"):
        graphs.run("key", lambda: None)


def test_a_moved_decode_buffer_is_detected(cuda, tokenizer, monkeypatch):
    run = static_decodes.StaticDecodes.run

    def moves(decodes, plan):
        decodes._slots = decodes._slots.clone()
        return run(decodes, plan)

    monkeypatch.setattr(static_decodes.StaticDecodes, "run", moves)
    engine, _ = engine_on(cuda, tokenizer)
    with pytest.raises(Fault, match=r"free by now, .*sdpa\.py:\d+ in store"):
        run_all(engine, [(aligned(2.0, 20), SHORT)])


# When copies read memory


def test_pinned_memory_may_change_after_the_event(cuda):
    source = torch.ones(3).pin_memory()
    x, event = CudaTensor(torch.zeros(3)), torch.cuda.Event()
    x.copy_(source, non_blocking=True)
    event.record()
    event.synchronize()
    source.fill_(2)
    x.copy_(source, non_blocking=True)
    assert x.sum().item() == 6  # item() waits too
    source.fill_(3)
    assert set(cuda.waits) == {
        f"test_fake_cuda_memory.py:test_pinned_memory_may_change_after_the_event: {what}"
        for what in ("Event.synchronize", "aten._local_scalar_dense.default")
    }


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:2]], ids=["all of it", "a view"])
@pytest.mark.parametrize(
    ("copy", "place"),
    [
        (lambda x: to_device(x, CUDA), r"transfer\.py:\d+ in to_device"),
        (
            lambda x: CudaTensor(torch.zeros(x.shape)).copy_(x, non_blocking=True),
            r"test_fake_cuda_memory\.py:\d+ in <lambda>",
        ),
    ],
    ids=["to_device", "copy_"],
)
@pytest.mark.usefixtures("cuda")
def test_a_change_of_pinned_memory_before_the_event_is_detected(view, copy, place):
    source = torch.ones(3).pin_memory()
    early, late = torch.cuda.Event(), torch.cuda.Event()
    early.record()
    copy(view(source))
    late.record()
    source.numpy()[1] = 2  # not a torch operation
    early.synchronize()
    with pytest.raises(Fault, match=f"overwritten before it was copied to the device, .*{place}"):
        late.synchronize()


def test_a_change_of_pinned_memory_without_a_wait_is_detected():
    def overwrite():
        with FakeCuda():
            source = torch.ones(3).pin_memory()
            to_device(source, CUDA)
            source.zero_()

    with pytest.raises(Fault, match="overwritten before"):
        overwrite()


def test_a_staging_buffer_that_is_reused_too_early_is_detected(cuda, tokenizer, monkeypatch):
    """Step N + 1 is launched before the host has waited for step N."""
    buffers = {}

    def staged(values, device):
        source = torch.from_numpy(values)
        buffer = buffers.setdefault((len(buffers) % 5, source.shape), torch.empty_like(source, pin_memory=True))
        return buffer.copy_(source).to(device, non_blocking=True)

    monkeypatch.setattr(static_decodes, "to_device", staged)
    engine, _ = engine_on(cuda, tokenizer)
    with pytest.raises(Fault, match=r"overwritten before .*test_fake_cuda_memory\.py:\d+ in staged"):
        run_all(engine, [(aligned(2.0, 20), SHORT)])
