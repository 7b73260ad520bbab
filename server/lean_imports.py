"""A shorter start for the embedded model: torch and transformers without what this model never uses.

transformers imports, wherever they are installed, packages and parts of torch that are for training, other models and
several machines; they take half of the time of a start (docs/decisions/0020). Here it finds what it would find on a
machine that lacks them: a torch without `torch.distributed`, and no package of ABSENT. `torch._dynamo`, which it
asks nothing but marks of, is a stand-in that marks nothing, until the model is loaded.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

ABSENT = ("accelerate", "scipy", "sklearn", "torchao", "triton")
MARKS = ("torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op")


class _Marks(ModuleType):
    """Every name in it is a decorator, or makes one, that changes nothing."""

    __path__: list[str] = []  # its submodules are like it  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


def _unchanged(marked: Any = None, *_: object, **__: object) -> Any:
    return marked if callable(marked) else _unchanged


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """While this holds, alignment_core is imported and the embedded model is loaded, on a CPU. Another model can't be
    counted on in this process.
    """
    if "transformers.modeling_utils" in sys.modules:  # there is nothing left to spare
        yield
        return
    import torch

    modules: dict[str, Any] = dict.fromkeys(ABSENT)
    modules |= {name: _Marks(name) for name in MARKS}
    disable: Any = torch.compiler.disable
    torch.distributed.is_available = lambda: False
    torch.compiler.disable = _unchanged  # type: ignore[assignment]
    torch._dynamo = modules[MARKS[0]]
    sys.modules.update(modules)
    try:
        yield
    finally:
        torch.compiler.disable = disable
        del torch._dynamo
        for name in modules:
            del sys.modules[name]
