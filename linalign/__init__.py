"""linalign: an inference engine, and an OpenAI-compatible server, whose replies are decoded by Linear Alignment.

`__all__` is the public API. Everything else is private and may change. A name's module is imported when the name is
first used (PEP 562): settings and errors need no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linalign.alignment_core.engine import Engine
    from linalign.alignment_core.engine_config import EngineConfig
    from linalign.alignment_core.errors import (
        EngineBusy,
        EngineDead,
        InvalidRequest,
        LinalignError,
        LoadingError,
        RequestFailed,
    )
    from linalign.alignment_core.loading.loader import load
    from linalign.alignment_core.methods import METHODS, MethodRule
    from linalign.alignment_core.output import Output, Stats, TokenLogprob, Trace, Usage
    from linalign.alignment_core.request import Principle, Prompt, SamplingParams, Structure

MODULES = {
    "METHODS": "methods",
    "Engine": "engine",
    "EngineBusy": "errors",
    "EngineConfig": "engine_config",
    "EngineDead": "errors",
    "InvalidRequest": "errors",
    "LinalignError": "errors",
    "LoadingError": "errors",
    "MethodRule": "methods",
    "Output": "output",
    "Principle": "request",
    "Prompt": "request",
    "RequestFailed": "errors",
    "SamplingParams": "request",
    "Stats": "output",
    "Structure": "request",
    "TokenLogprob": "output",
    "Trace": "output",
    "Usage": "output",
    "load": "loading.loader",
}

__all__ = [
    "METHODS",
    "Engine",
    "EngineBusy",
    "EngineConfig",
    "EngineDead",
    "InvalidRequest",
    "LinalignError",
    "LoadingError",
    "MethodRule",
    "Output",
    "Principle",
    "Prompt",
    "RequestFailed",
    "SamplingParams",
    "Stats",
    "Structure",
    "TokenLogprob",
    "Trace",
    "Usage",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.alignment_core.{MODULES[name]}")
    value = globals()[name] = getattr(module, name)
    return value
