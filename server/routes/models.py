"""GET /v1/models, /health, /version."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request

from linalign.server.models import preset_of
from linalign.server.state import state_of

router = APIRouter()


def _models(request: Request) -> list[dict[str, Any]]:
    state = state_of(request)
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
        for name, preset in (state.presets.items() if "model" in state.settings.alignment_from else ())
    ]
    return [own, *presets]


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The model itself, then the model with each preset."""
    return {"object": "list", "data": _models(request)}


@router.get("/v1/models/{id:path}")
async def retrieve_model(id: str, request: Request) -> dict[str, Any]:
    own, *presets = _models(request)
    for model in (own, *presets):
        if model["id"] == id:
            return model
    preset = preset_of(id, state_of(request))  # with a ratio in the name
    return own | {"id": id, "parent": own["id"], "preset": preset.model_dump(exclude_none=True)}


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 while the engine runs and accepts requests, else 503."""
    engine = state_of(request).engine
    await engine.check_health()
    return {"status": "ok"}


@router.get("/version")
async def show_version() -> dict[str, str]:
    return {"version": version("linalign")}
