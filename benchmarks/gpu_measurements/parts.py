"""Parts of the engine that can be disabled, to find out which of them is at fault."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from linalign.alignment_core.attention import sdpa
from linalign.alignment_core.decoding import static_draw, static_sampler
from linalign.alignment_core.execution import cuda_graphs, model_runner


@contextlib.contextmanager
def without(*parts: str | None) -> Iterator[None]:
    """Disable parts of the engine ("compile", "Triton", "graphs") inside the block; None disables nothing."""
    with contextlib.ExitStack() as stack:

        def patch(owner: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for part in parts:
            match part:
                case "compile":
                    patch(model_runner, "compile_layers", lambda *_: None)
                    patch(static_sampler, "compiled_draw", lambda *_: static_draw.draw_from_logits)
                case "Triton":
                    patch(model_runner, "_choose_backend", lambda _: sdpa.NAME)
                case "graphs":
                    patch(cuda_graphs.Graphs, "run", _run_without_graph)
                case str():
                    raise ValueError(part)
        yield


def _run_without_graph(graphs: cuda_graphs.Graphs, _: object, function: Any) -> None:
    graphs.num_runs += 1
    function()
