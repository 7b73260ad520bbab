"""Faults planted in the GPU code path; the fake device must detect each."""

import operator

import pytest
import torch

from linalign.alignment_core.decoding import alignment, static_draw
from linalign.alignment_core.execution.cuda_graphs import Graphs
from linalign.alignment_core.transfer import to_device, to_host
from tests.engines import aligned, run_all
from tests.fake_cuda import CUDA, CudaTensor, Fault
from tests.fake_cuda.engine import SHORT, WHERE_THE_HOST_WAITS, engine_on, several

pytestmark = pytest.mark.slow

pytest_plugins = ["tests.fake_cuda.fixtures"]


def plant(monkeypatch, module, name, fault):
    """Make a function run `fault` before its own code."""
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: (fault(*args), function(*args, **kwargs))[1])


def test_a_read_of_a_value_in_the_draw_is_detected(cuda, tokenizer, monkeypatch):
    plant(monkeypatch, static_draw, "inverse_transform", lambda mass, _: mass.sum().item())
    with pytest.raises(Fault, match=r"refuses aten\._local_scalar_dense.*test_fake_cuda_faults\.py:\d+"):
        engine_on(cuda, tokenizer, warm_up=True)


def test_a_nonzero_in_a_capture_is_detected(cuda, tokenizer, monkeypatch):
    plant(monkeypatch, static_draw, "leading", lambda x, *_: (x > 0).nonzero())
    with pytest.raises(Fault, match=r"refuses aten\.nonzero.*test_fake_cuda_faults\.py:\d+"):
        engine_on(cuda, tokenizer, warm_up=True)


def test_a_read_beside_the_captured_draw_is_detected(cuda, tokenizer, monkeypatch):
    engine, _ = engine_on(cuda, tokenizer)
    plant(monkeypatch, engine.loop.sampler, "draw", lambda logits, *_: logits.isnan().any().item())
    run_all(engine, [(aligned(2.0, 20), SHORT)])
    assert set(cuda.waits) - WHERE_THE_HOST_WAITS == {
        "test_fake_cuda_faults.py:<lambda>: aten._local_scalar_dense.default"
    }


def test_a_host_index_in_the_mixing_is_detected(cuda, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(alignment.Mixing, "to", lambda mixing, _: mixing)
    engine, _ = engine_on(cuda, tokenizer)
    run_all(engine, [(several(), SHORT)])
    assert any("with an index on the host" in wait for wait in cuda.waits)
    assert any("operands on two devices" in str(record.exc_info) for record in caplog.records)
    caplog.clear()


@pytest.mark.parametrize(
    ("fault", "refused"),
    [
        (lambda x: x + torch.ones(3), "operands on two devices"),
        (lambda x: torch.cat([x, torch.ones(3)]), "operands on two devices"),
        (lambda x: x[torch.tensor([0, 2])], "index on the host"),
        (lambda x: x[[0, 2]], "a list as an index"),
        (lambda x: x[x > 0], "index.Tensor"),
        (lambda x: x.normal_(), "random numbers"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x[x.argmax()], "_local_scalar_dense"),
        (lambda x: x[: x.argmax()], "_local_scalar_dense"),
        (lambda x: x.to("cpu"), "a copy to the host"),
        (lambda x: to_host(x), "a copy to the host"),
        (lambda x: to_device(torch.ones(3), x.device), "a copy from the host"),
        (lambda x: torch.tensor([1.0], device=x.device), "tensor"),
        (lambda _: torch.cuda.empty_cache(), "empty_cache"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("cuda")
def test_a_capture_refuses_synchronising_operations(fault, refused):
    x = CudaTensor(torch.ones(3))
    graphs = Graphs(CUDA)
    with pytest.raises(Fault, match=refused):
        graphs.run("key", lambda: fault(x))
    assert len(graphs) == 0


def test_a_graph_repeats_what_it_recorded(cuda):
    """Python does not run again, so the replay does not see the changed number."""
    x, out, numbers = CudaTensor(torch.ones(2)), CudaTensor(torch.zeros(2)), [10]
    graphs = Graphs(CUDA)
    with torch.inference_mode():
        for value, number, expected in ((1, 10, 12), (5, 99, 20)):
            x.fill_(value)
            numbers[0] = number
            graphs.run("key", lambda: out.copy_((x * 2).add_(numbers[0])))
            assert out.inner.tolist() == [expected] * 2
    assert cuda.waits == {}


@pytest.mark.parametrize(
    "look",
    [
        lambda x, i: x[i],
        lambda x, i: x[None, i:],
        lambda x, i: x[..., :i],
        lambda x, i: x[i > 0],
        lambda x, i: operator.setitem(x, i, 5.0),
        lambda x, i: operator.setitem(x, slice(i), 5.0),
        lambda _, i: torch.ones(3)[i],
        lambda _, i: torch.ones(3)[:i],
        lambda _, i: [1, 2, 3][i],
        lambda _, i: float(i),
    ],
)
def test_a_number_that_the_host_reads_to_index_is_a_wait(cuda, look):
    """As in torch: TensorIndexing.h calls item() on 0-dim integers and bools, and slices call __index__."""
    look(CudaTensor(torch.arange(3.0)), CudaTensor(torch.tensor(2)))
    assert cuda.waits == {"test_fake_cuda_faults.py:<lambda>: aten._local_scalar_dense.default": 1}


def test_scalar_indices_read_and_write_like_torch(cuda):
    x, i = CudaTensor(torch.arange(6.0).view(2, 3)), CudaTensor(torch.tensor(1))
    assert x[i].inner.tolist() == x[torch.tensor(1)].inner.tolist() == [3, 4, 5]
    assert x[:, i].inner.tolist() == [1, 4]
    assert x[i, i + 1].inner.item() == 5
    assert x[i > 0].inner.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert x[i > 1].shape == (0, 2, 3)
    assert x[True, ..., i].inner.tolist() == [[1, 4]]
    x[i, : i + 1] = 7.0
    assert x.inner.tolist() == [[0, 1, 2], [7, 7, 5]]
    cuda.waits.clear()
    assert x[0, torch.tensor(2)].inner.item() == 2  # a host tensor: no wait
    assert x[i[None]].inner.tolist() == [[7, 7, 5]]  # a one-dimensional index is read on the device
    assert cuda.waits == {}


def test_a_scalar_index_in_the_draw_is_detected(cuda, tokenizer, monkeypatch):
    plant(monkeypatch, static_draw, "inverse_transform", lambda mass, uniform: mass[(uniform > 2).sum()])
    with pytest.raises(Fault, match=r"refuses aten\._local_scalar_dense.*test_fake_cuda_faults\.py:\d+"):
        engine_on(cuda, tokenizer, warm_up=True, model={"num_hidden_layers": 1})


@pytest.mark.usefixtures("cuda")
def test_the_host_has_a_copy_only_after_an_event():
    device = CudaTensor(torch.ones(2))
    host = to_host(device)
    assert host.isnan().all()
    event = torch.cuda.Event()
    event.record()
    device.fill_(2.0)
    event.synchronize()
    assert host.tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("cuda")
def test_unwritten_memory_is_detected():
    assert torch.empty(2, device=CUDA).inner.isnan().all()
    assert CudaTensor(torch.ones(2)).new_empty(2).inner.isnan().all()
