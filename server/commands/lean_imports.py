"""Imports torch and transformers without the parts that the embedded model does not use, for a shorter start.

If they are installed, transformers imports packages and parts of torch for training, other models and several
machines, which takes two seconds (docs/decisions/0020). `lean_imports` hides them: the packages of ABSENT and
`torch.distributed`. transformers uses only decorators of `torch._dynamo`, which a stand-in replaces until the model is
loaded.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

ABSENT = ("PIL", "scipy", "sklearn", "torchao", "triton")
REPLACED = ("torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op")


class _StandInType(type):
    """Metaclass of a stand-in for modules, decorators and decorator factories. All its attributes are the stand-in
    itself. It has no instances, and returns decorated objects unchanged.
    """

    __path__: tuple[str, ...] = ()  # importable as a package

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, decorated: Any = None, *_: object, **__: object) -> Any:
        return cls if decorated is None else decorated


class _StandIn(metaclass=_StandInType):
    pass


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Import alignment_core and load the embedded model, on a CPU, within this context. Other models may fail to load
    in this process afterwards.
    """
    if "transformers" in sys.modules:  # it has already looked for these packages
        yield
        return
    import torch

    modules: dict[str, Any] = dict.fromkeys(ABSENT)
    modules |= dict.fromkeys(REPLACED, _StandIn)
    disable: Any = torch.compiler.disable
    torch.distributed.is_available = lambda: False
    torch.compiler.disable = _StandIn  # type: ignore[assignment]
    torch._dynamo = _StandIn
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        torch.compiler.disable = disable
        del torch._dynamo
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)
