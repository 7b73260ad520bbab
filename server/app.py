"""The FastAPI application over one engine."""

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from alignment_core import Engine
from server import metrics
from server.auth import KeyRequired
from server.body_limit import BodyLimit
from server.presets import load_presets
from server.protocol.errors import HANDLERS, ErrorResponse
from server.routes import chat, completions, models, playground, responses, tokens
from server.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorResponse, "description": "An error"}}


def _fingerprint(engine: Engine, settings: Settings) -> str:
    """The same for servers whose seeded replies are the same."""
    parts = (version("linalign"), engine.model_id, settings.dtype, settings.quantization, settings.kv_cache_dtype)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application; the engine's loop runs while the application does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with engine:
            yield

    AppStatus.enable_automatic_graceful_drain = False  # streams have as much time to end as other replies
    app = FastAPI(title="linalign", lifespan=lifespan, exception_handlers=HANDLERS, responses=ERRORS)
    app.state.engine = engine
    app.state.settings = settings
    app.state.presets = load_presets(settings.presets)
    app.state.registry = metrics.registry_of(engine)
    app.state.started = int(time.time())
    app.state.fingerprint = _fingerprint(engine, settings)
    app.include_router(chat.router)
    app.include_router(completions.router)
    app.include_router(responses.router)
    app.include_router(tokens.router)
    app.include_router(models.router)
    app.include_router(metrics.router)
    app.include_router(playground.router)
    app.mount("/playground", playground.files)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.api_keys:  # added last, it comes first: strangers' bodies are not even counted
        app.add_middleware(KeyRequired, keys=[key.get_secret_value() for key in settings.api_keys])
    _name_models(app.openapi(), [engine.model_id, *(f"{engine.model_id}:{name}" for name in app.state.presets)])
    return app


def _name_models(schema: dict[str, Any], names: list[str]) -> None:
    """Tell in the OpenAPI schema which models there are."""
    for component in schema["components"]["schemas"].values():
        if "model" in component.get("properties", {}):
            component["properties"]["model"]["enum"] = names
