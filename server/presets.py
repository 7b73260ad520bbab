"""Presets: what names of the model may stand for, from a YAML file."""

from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from server.protocol.generation import Preset

SHIPPED = Path(__file__).parent.parent / "configs" / "presets.yaml"


def load_presets(file: Path | None) -> dict[str, Preset]:
    """Presets by name; those that come with linalign where no file is given. Raises ValueError."""
    file = file or SHIPPED
    try:
        content = yaml.safe_load(file.read_text())
        return TypeAdapter(dict[str, Preset]).validate_python(content or {})
    except (OSError, yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise ValueError(f"the presets of {file} can't be used: {error}") from error
