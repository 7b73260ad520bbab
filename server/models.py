"""The names under which the model is served: its own, and one for each preset, both with or without a ratio."""

from linalign.server.presets import preset_named
from linalign.server.protocol.errors import ModelNotFound
from linalign.server.protocol.generation import Preset
from linalign.server.protocol.strict_json import InvalidBody
from linalign.server.state import ServerState


def preset_of(model: str | None, state: ServerState) -> Preset:
    """The preset that the name of a model stands for; an empty one for the model itself.

    Names are MODEL, MODEL:PRESET, MODEL@RATIO and MODEL:PRESET@RATIO. Raises ModelNotFound, and InvalidBody for a ratio
    out of range.
    """
    own = state.engine.model_id
    if model is None or model == own:
        return Preset()
    suffix = model.removeprefix(own)
    if suffix == model or suffix[0] not in ":@" or "model" not in state.settings.alignment_from:
        raise ModelNotFound(model)
    try:
        return preset_named(suffix.removeprefix(":"), state.presets)
    except KeyError as error:
        raise ModelNotFound(model) from error
    except ValueError as error:
        raise InvalidBody(f"model: {error}", "model", "invalid_value") from error
