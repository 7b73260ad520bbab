"""GET /v1/models, /health, /version."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from server.protocol.errors import ModelNotFound, error_response

router = APIRouter()


def _models(request: Request) -> list[dict[str, Any]]:
    state = request.app.state
    model = {"object": "model", "created": state.started, "owned_by": "linalign"}
    model |= {"max_model_len": state.engine.max_model_len}
    own = {"id": state.engine.model_id, **model}
    presets = [
        {
            "id": f"{state.engine.model_id}:{name}",
            **model,
            "parent": state.engine.model_id,
            "preset": preset.model_dump(exclude_none=True),
        }
        for name, preset in state.presets.items()
    ]
    return [own, *presets]


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The model itself, then the model with each preset."""
    return {"object": "list", "data": _models(request)}


@router.get("/v1/models/{id:path}")
async def retrieve_model(id: str, request: Request) -> dict[str, Any]:
    for model in _models(request):
        if model["id"] == id:
            return model
    raise ModelNotFound(id)


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
