"""Fixes the time that a chat template shows, so that all branches of a prompt show the same time.

Templates call `strftime_now(format)`. transformers reads the clock at every call and does not allow to replace the
function. So a macro of the same name is put before the template; it looks the format up in a variable.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime

from jinja2 import nodes

NAME, TIMES = "strftime_now", "linalign_times"
MACRO = f"{{% macro {NAME}(format) %}}{{{{ {TIMES}[format] }}}}{{% endmacro %}}\n"  # jinja2 drops the newline


def formats_of(templates: Iterable[nodes.Template]) -> frozenset[str]:
    """The time formats that the templates use; empty if they use none, or compute a format while rendering."""
    calls = [call for template in templates for call in template.find_all(nodes.Call) if _is_name(call.node, NAME)]
    arguments = [value for call in calls for value in (*call.args, *(named.value for named in call.kwargs))]
    if not all(isinstance(argument, nodes.Const) for argument in arguments):
        return frozenset()
    return frozenset(str(argument.value) for argument in arguments if isinstance(argument, nodes.Const))


def held_still(template: str) -> str:
    """The template with the macro before it. Render the result with `variables` too."""
    return MACRO + template


def variables(formats: Iterable[str], now: datetime) -> Mapping[str, object]:
    """Template variables for the macro: the time in each format."""
    return {TIMES: {form: now.strftime(form) for form in formats}}


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name
