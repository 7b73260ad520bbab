"""A shorter start for the embedded model: torch and transformers without what this model never uses.

transformers imports, wherever they are installed, packages and parts of torch that are for training, other models and
several machines; they take two seconds of a start (docs/decisions/0020). Here it finds what it would find on a
machine that lacks them: a torch without `torch.distributed`, and no package of ABSENT. `torch._dynamo`, which it
asks nothing but marks of, is a stand-in that marks nothing, until the model is loaded.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

ABSENT = ("PIL", "scipy", "sklearn", "torchao", "triton")
MARKS = ("torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op")


class _Mark(type):
    """Of a class that is a module, a decorator and what makes one, and has such classes as attributes; nothing is an
    instance of it, and what it decorates is left as it is.
    """

    __path__: tuple[str, ...] = ()  # it has submodules

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, marked: Any = None, *_: object, **__: object) -> Any:
        return cls if marked is None else marked


class _Marks(metaclass=_Mark):
    pass


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """While this holds, alignment_core is imported and the embedded model is loaded, on a CPU. Another model can't be
    counted on in this process.
    """
    if "transformers" in sys.modules:  # it has looked for these packages, and remembers them
        yield
        return
    import torch

    modules: dict[str, Any] = dict.fromkeys(ABSENT)
    modules |= dict.fromkeys(MARKS, _Marks)
    disable: Any = torch.compiler.disable
    torch.distributed.is_available = lambda: False
    torch.compiler.disable = _Marks  # type: ignore[assignment]
    torch._dynamo = _Marks
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
