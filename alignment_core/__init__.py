"""Linear Alignment at decoding time, as a library: DESIGN section 2 over a paged, batched engine.

A name's module is imported when the name is first used: whoever reads settings, or an error, needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment_core.engine import Engine
    from alignment_core.engine_config import EngineConfig
    from alignment_core.errors import EngineBusy, EngineDead, InvalidRequest, LoadingError, RequestFailed
    from alignment_core.loading import load
    from alignment_core.output import Output, Usage
    from alignment_core.request import Principle, Prompt, SamplingParams

MODULES = {
    "Engine": "engine",
    "EngineBusy": "errors",
    "EngineConfig": "engine_config",
    "EngineDead": "errors",
    "InvalidRequest": "errors",
    "LoadingError": "errors",
    "Output": "output",
    "Principle": "request",
    "Prompt": "request",
    "RequestFailed": "errors",
    "SamplingParams": "request",
    "Usage": "output",
    "load": "loading",
}

__all__ = [
    "Engine",
    "EngineBusy",
    "EngineConfig",
    "EngineDead",
    "InvalidRequest",
    "LoadingError",
    "Output",
    "Principle",
    "Prompt",
    "RequestFailed",
    "SamplingParams",
    "Usage",
    "load",
]


def __getattr__(name: str) -> Any:
    """PEP 562."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
    return value
