"""What the application keeps between requests."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from opentelemetry.trace import Tracer
from starlette.requests import Request

from linalign.server.engine_client import EngineClient
from linalign.server.metrics import Measures
from linalign.server.protocol.generation import Preset
from linalign.server.response_store import ResponseStore
from linalign.server.settings import Settings


@dataclass(frozen=True, slots=True)
class ServerState:
    engine: EngineClient
    settings: Settings
    presets: Mapping[str, Preset]  # by name
    key_presets: Mapping[bytes | None, Preset]  # by the hash of an API key
    responses: ResponseStore | None  # conversations of /v1/responses, if they are kept
    measures: Measures  # metrics
    tracer: Tracer  # for spans of requests to the engine
    long_bodies: ThreadPoolExecutor  # the one thread that works on requests with long bodies
    started: int  # seconds since 1970
    fingerprint: str  # the same for servers whose seeded replies are the same


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
