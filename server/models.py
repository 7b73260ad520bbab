"""The names under which the model is served: its own, and one for each preset."""

from typing import TypeVar

from starlette.datastructures import State

from linalign.server.protocol.errors import ModelNotFound
from linalign.server.protocol.generation import AlignmentFields, Preset

Body = TypeVar("Body", bound=AlignmentFields)


def preset_of(model: str, state: State) -> Preset:
    """What the name of a model asks for. Raises ModelNotFound."""
    if model == state.engine.model_id:
        return Preset()
    name = model.removeprefix(f"{state.engine.model_id}:")
    if name == model or name not in state.presets:
        raise ModelNotFound(model)
    preset: Preset = state.presets[name]
    return preset


def serving(body: Body, state: State) -> Body:
    """The request with what its preset says beside its own fields. Raises ModelNotFound."""
    preset = preset_of(body.model, state)
    given = {name for name in body.model_fields_set if getattr(body, name) is not None}
    names = (preset.model_fields_set - given) & set(type(body).model_fields)
    return body.model_copy(update={name: getattr(preset, name) for name in names})
