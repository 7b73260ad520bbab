"""Linear Alignment at decoding time, as a library: DESIGN section 2 over a paged, batched engine."""

from alignment_core.backlog import EngineBusy
from alignment_core.engine import Engine, EngineDead
from alignment_core.engine_config import EngineConfig
from alignment_core.loading import LoadingError, load
from alignment_core.prompts import Principle
from alignment_core.sequence import InvalidRequest, Output, Prompt, RequestFailed, SamplingParams, Usage

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
