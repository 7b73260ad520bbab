"""The fake device as a fixture: `pytest_plugins = ["tests.fake_cuda.fixtures"]`."""

import logging

import pytest

from linalign.alignment_core import assembly
from linalign.alignment_core.attention import paged_triton
from linalign.alignment_core.decoding import static_draw, static_sampler
from linalign.alignment_core.execution import model_runner
from linalign.alignment_core.scheduling import scheduler
from tests.engines import PROGRAMS
from tests.fake_cuda import FakeCuda


@pytest.fixture
def cuda(monkeypatch, caplog):
    """The device, entered for the whole test. A failed draw is logged and retried another way: logged errors fail."""
    device = FakeCuda()
    device.patch(monkeypatch, (paged_triton, "_attend_kernel"), (paged_triton, "_combine_kernel"))
    monkeypatch.setattr(paged_triton, "PROGRAMS", PROGRAMS)
    for module in (assembly, scheduler):
        monkeypatch.setattr(module, "SPECULATIVE_BATCH", 4)  # fewer sizes to capture
    monkeypatch.setattr(model_runner, "compile_layers", lambda _: None)
    monkeypatch.setattr(static_sampler, "compiled_draw", lambda: static_draw.draw_from_logits)
    with device:
        yield device
    assert [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []
