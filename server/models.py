"""The names under which the model is served: its own, and one for each preset, both with or without a ratio."""

from collections.abc import Mapping

from linalign.alignment_core.request import MAX_RATIO, MIN_RATIO
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


def preset_named(name: str, presets: Mapping[str, Preset]) -> Preset:
    """The preset PRESET, PRESET@RATIO or, for an empty preset with a ratio, @RATIO. Raises KeyError, ValueError."""
    if name in presets:
        return presets[name]
    base, separator, ratio = name.rpartition("@")
    if not separator:
        raise KeyError(name)
    preset = presets[base] if base else Preset()
    return preset.model_copy(update={"alignment_ratio": ratio_of(ratio)})


def ratio_of(text: str) -> float:
    """The ratio that a text spells. Raises ValueError."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = float("nan")
    if not MIN_RATIO <= ratio <= MAX_RATIO:
        raise ValueError(f"the ratio must be a number in [{MIN_RATIO:g}, {MAX_RATIO:g}]")
    return ratio
