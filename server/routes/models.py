"""GET /v1/models, /health, /version."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from server.protocol.errors import ModelNotFound, error_response

router = APIRouter()


def _model(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {"id": state.engine.model_id, "object": "model", "created": state.started, "owned_by": "linalign"}


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(request)]}


@router.get("/v1/models/{id:path}")
async def retrieve_model(id: str, request: Request) -> dict[str, Any]:
    if id != request.app.state.engine.model_id:
        raise ModelNotFound(id)
    return _model(request)


@router.head("/health", include_in_schema=False, response_model=None)
@router.get("/health", response_model=None)
async def health(request: Request) -> Response | dict[str, str]:
    """200 while the engine runs and accepts requests, else 503."""
    if not request.app.state.engine.alive:
        return error_response(503, "the engine is not running", code="engine_dead", kind="server_error")
    return {"status": "ok"}


@router.get("/version")
async def show_version() -> dict[str, str]:
    return {"version": version("linalign")}
