"""Reads presets from a YAML file, and finds them by name."""

from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from linalign.alignment_core.request import MAX_RATIO, MIN_RATIO
from linalign.server.command_line import describe_errors
from linalign.server.protocol.generation import Preset

SHIPPED = Path(__file__).parent.parent / "configs" / "presets.yaml"


def load_presets(file: Path | None) -> dict[str, Preset]:
    """Presets by name; those that are installed with linalign if no file is given. Raises ValueError."""
    file = file or SHIPPED
    try:
        content = yaml.safe_load(file.read_text())
        presets = TypeAdapter(dict[str, Preset]).validate_python(content or {})
    except ValidationError as error:
        raise ValueError(f"the presets of {file} can't be used: {describe_errors(error)}") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the presets of {file} can't be used: {error}") from error
    for name, preset in presets.items():
        if not name.isprintable() or not name.strip():  # line ends, halves of surrogate pairs
            raise ValueError(f"the presets of {file} can't be used: {name!r} is not a valid name")
        try:
            preset.model_dump_json()
        except ValueError as error:
            raise ValueError(f"the presets of {file} can't be used: {name} has invalid text") from error
    return presets


def presets_of_keys(names: Mapping[bytes, str], presets: Mapping[str, Preset]) -> dict[bytes | None, Preset]:
    """The default presets of API keys. Raises ValueError for a name that is no preset."""
    found = dict[bytes | None, Preset]()
    for key, name in names.items():
        try:
            found[key] = preset_named(name, presets)
        except KeyError as error:
            raise ValueError(f"an API key has the default preset {name}, which does not exist") from error
    return found


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
