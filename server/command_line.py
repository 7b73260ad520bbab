"""Command-line parsers and help pages for settings classes."""

import argparse
import inspect
import shutil
import sys
import textwrap
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource

MAX_WIDTH = 100  # columns, because longer lines are hard to read

T = TypeVar("T", bound=BaseSettings)


class HelpPage(argparse.HelpFormatter):
    """A help page of the terminal's width, up to MAX_WIDTH. Wraps paragraphs, except those with indented lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns, MAX_WIDTH) - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        del indent
        parts = text.strip().split("\n\n")
        return "\n\n".join(part if "\n  " in part else "\n".join(self._split_lines(part, width)) for part in parts)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def help_source(cls: type[T]) -> CliSettingsSource[argparse.ArgumentParser]:
    """A source of settings from the command line. `--help` shows the class's docstring, its fields and its EPILOG.

    SECTIONS maps the first field of each section to the section's title. A field's title is the name of its value. If
    the default of a field is None, its description names the default.
    """
    parser = argparse.ArgumentParser(
        prog=cls.model_config["cli_prog_name"],
        description=inspect.getdoc(cls),
        epilog=getattr(cls, "EPILOG", None),
        formatter_class=HelpPage,
        allow_abbrev=False,
        add_help=False,
    )
    sections: dict[str, str] = getattr(cls, "SECTIONS", {})
    section, groups, usage = parser.add_argument_group("options"), {}, []
    for name in cls.model_fields:
        if name in sections:
            section = parser.add_argument_group(sections[name])
        groups[name] = section

    def add(_: object, *flags: str, **options: Any) -> None:
        name = options.get("dest", flags[0])
        field = cls.model_fields[name]
        if field.title:
            options["metavar"] = field.title
        options["help"] = _described(field).replace("%", "%%")
        action = groups[name].add_argument(*flags, **options)
        if not action.option_strings:
            usage.append(f"{action.metavar}" if field.is_required() else f"[{action.metavar}]")
        elif field.is_required():
            usage.append(f"{flags[0]} {action.metavar}")

    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        cls, root_parser=parser, add_argument_method=add
    )
    section.add_argument("-h", "--help", action="help", help="show this page")
    parser.usage = " ".join([parser.prog, *usage, "[OPTION ...]"])
    return source


def _described(field: FieldInfo) -> str:
    """The field's description, with its default unless that is None."""
    description, default = field.description or "", field.default
    if field.is_required():
        return f"{description} (required)"
    if default in (None, "", {}) or field.default_factory:
        return description
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
    if isinstance(default, tuple):
        shown = ",".join(map(str, default)) or "none"
    return f"{description} (default: {shown})"


def describe_errors(error: ValidationError) -> str:
    """All invalid settings and their errors, in one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())


def parse(cls: type[T], args: list[str]) -> T:
    """The settings of a command line. Ends the process if they are invalid, and after `--help`."""
    try:
        return CliApp.run(cls, cli_args=args, cli_settings_source=help_source(cls))
    except ValidationError as error:
        sys.exit(f"{cls.model_config['cli_prog_name']}: {describe_errors(error)}")
