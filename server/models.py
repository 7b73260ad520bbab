"""The names under which the model is served: its own, and one for each preset."""

from typing import TypeVar

from linalign.server.protocol.errors import ModelNotFound
from linalign.server.protocol.generation import AlignmentFields, Preset
from linalign.server.state import ServerState

Body = TypeVar("Body", bound=AlignmentFields)


def preset_of(model: str | None, state: ServerState) -> Preset:
    """The preset that the name of a model stands for; an empty one for the model itself. Raises ModelNotFound."""
    if model is None or model == state.engine.model_id:
        return Preset()
    name = model.removeprefix(f"{state.engine.model_id}:")
    if name == model or name not in state.presets:
        raise ModelNotFound(model)
    return state.presets[name]


def with_preset(body: Body, state: ServerState) -> Body:
    """The request, with the values of its preset in fields that it leaves out. Raises ModelNotFound."""
    preset = preset_of(body.model, state)
    given = {name for name in body.model_fields_set if getattr(body, name) is not None}
    names = (preset.model_fields_set - given) & set(type(body).model_fields)
    model = state.engine.model_id if body.model is None else body.model
    return body.model_copy(update={"model": model, **{name: getattr(preset, name) for name in names}})
