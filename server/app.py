"""The FastAPI application over one engine."""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI
from sse_starlette.sse import AppStatus
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from linalign.server.alignment_sources import APPLIED_HEADER
from linalign.server.engine_client import EngineClient
from linalign.server.metrics import Measures
from linalign.server.middleware import auth
from linalign.server.middleware.access_log import AccessLog
from linalign.server.middleware.allowed_hosts import AllowedHosts
from linalign.server.middleware.body_limit import BodyLimit
from linalign.server.middleware.key_limits import KeyLimits
from linalign.server.presets import load_presets, presets_of_keys
from linalign.server.protocol.errors import HANDLERS, ErrorResponse
from linalign.server.protocol.ignored_fields import HEADER
from linalign.server.response_store import ResponseStore
from linalign.server.routes import (
    chat_completions,
    completions,
    messages,
    metrics,
    models,
    playground,
    responses,
    tokens,
)
from linalign.server.settings import Settings
from linalign.server.state import ServerState
from linalign.server.tracing import Tracing

ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorResponse, "description": "An error"}}
REQUEST_ID = "X-Request-Id"


def _fingerprint(engine: EngineClient, settings: Settings) -> str:
    """Equal for servers that give equal replies to requests with a seed."""
    parts = (version("linalign"), engine.model_id, settings.dtype, settings.quantization, settings.kv_cache_dtype)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def create_app(engine: EngineClient, settings: Settings) -> FastAPI:
    """The application. Its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield
        await asyncio.to_thread(state.long_bodies.shutdown, cancel_futures=True)
        await asyncio.to_thread(tracing.close)

    AppStatus.enable_automatic_graceful_drain = False  # streams may finish like other replies
    presets = load_presets(settings.presets)
    store = ResponseStore(settings.responses_store, settings.max_body_bytes)
    measures, tracing = Measures(), Tracing(settings.otlp_traces_endpoint)
    state = ServerState(
        engine=engine,
        settings=settings,
        presets=presets,
        key_presets=presets_of_keys(settings.key_presets, presets) if "key" in settings.alignment_from else {},
        responses=store if settings.responses_store else None,
        measures=measures,
        tracer=tracing.tracer,
        long_bodies=ThreadPoolExecutor(1, "long-bodies"),
        started=int(time.time()),
        fingerprint=_fingerprint(engine, settings),
    )
    app = FastAPI(
        title="linalign",
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        responses=ERRORS,
        middleware=_middleware(settings, measures),
        telemetry=tracing.telemetry,
    )
    app.state.server = state
    app.include_router(chat_completions.router)
    app.include_router(completions.router)
    app.include_router(responses.router)
    app.include_router(messages.router)
    app.include_router(tokens.router)
    app.include_router(models.router)
    app.include_router(metrics.router)
    app.include_router(playground.router)
    app.mount("/playground", playground.files)
    for path in app.openapi()["paths"]:
        if path.startswith("/v1/"):
            measures.expect(path)
    _list_models(app.openapi(), [engine.model_id, *(f"{engine.model_id}:{name}" for name in state.presets)])
    return app


def _middleware(settings: Settings, measures: Measures) -> list[Middleware]:
    """The middleware, outermost first. Requests without a valid key are refused before their bodies are read."""
    layers = [
        Middleware(CorrelationIdMiddleware, header_name=REQUEST_ID, validator=_is_request_id),
        Middleware(AccessLog, measures=measures),
    ]
    if settings.allowed_names is not None:
        layers.append(Middleware(AllowedHosts, settings.allowed_names))
    if settings.cors_origins:
        headers = [REQUEST_ID, "Retry-After", HEADER, APPLIED_HEADER]
        origins = list(settings.cors_origins)
        layers.append(Middleware(CORSMiddleware, origins, ["GET", "POST"], ["*"], expose_headers=headers))
    if settings.api_keys:
        open = (*auth.OPEN, "/metrics") if settings.metrics_without_key else auth.OPEN
        limits = (settings.max_requests_per_key, settings.max_tokens_per_minute_per_key)
        layers += [Middleware(auth.KeyRequired, settings.api_keys, open), Middleware(KeyLimits, *limits)]
    return [*layers, Middleware(BodyLimit, max_bytes=settings.max_body_bytes)]


def _is_request_id(id: str) -> bool:
    """Whether a client's request id is safe in logs and headers. Others are replaced by a new id."""
    return re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", id) is not None


def _list_models(schema: dict[str, Any], names: list[str]) -> None:
    """List the model names in the OpenAPI schema."""
    for component in schema["components"]["schemas"].values():
        if "model" in component.get("properties", {}):
            component["properties"]["model"]["enum"] = names
