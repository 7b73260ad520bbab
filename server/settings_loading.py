"""Reads the settings of `linalign serve` from its command line, the environment and the config file."""

import argparse
import difflib
import os
from pathlib import Path

import yaml
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, YamlConfigSettingsSource

from linalign.server.command_line import help_source
from linalign.server.settings import PREFIX, Settings


def _did_you_mean(name: str, known: list[str]) -> str:
    """'; did you mean X?' if a known name is similar, else an empty string."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _check_file(file: str) -> None:
    if not Path(file).is_file():
        raise ValueError(f"there is no config file {file}")
    try:
        content = yaml.safe_load(Path(file).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{file} must be a mapping of settings to values")
    if content and "config" in content:
        raise ValueError(f"{file} can't set config")


def check_variables() -> None:
    """Raises ValueError if the name of a variable LINALIGN_* is not a setting."""
    # api_key is for the client commands.
    known = [PREFIX + name.upper() for name in (*Settings.model_fields, "api_key")]
    given = [name for name in os.environ if name.upper().startswith(PREFIX)]
    if any(name.endswith("_SERVICE_HOST") for name in given):
        raise ValueError(
            "Kubernetes has set variables for a Service called linalign: set enableServiceLinks: false for the pods"
        )
    for name in given:
        if name.upper() not in known:
            raise ValueError(f"there is no setting {name}{_did_you_mean(name.upper(), known)}")


def load_settings(args: list[str]) -> Settings:
    """Settings from a command line, the environment and the config file. Raises ValueError, including pydantic's
    ValidationError, and SystemExit for --help.
    """
    check_variables()
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=os.environ.get(PREFIX + "CONFIG"))
    file: str | None = finder.parse_known_args(args)[0].config
    if file:
        _check_file(file)

    class WithFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del dotenv_settings, file_secret_settings  # not used
            sources = (init_settings, env_settings)
            return (*sources, YamlConfigSettingsSource(settings_cls, file)) if file else sources

    WithFile.__doc__ = Settings.__doc__
    return CliApp.run(WithFile, cli_args=args, cli_settings_source=help_source(WithFile))
