"""The time that a chat template shows, held still, so that all branches of a prompt show the same.

Templates ask for it by `strftime_now(format)`, which transformers answers anew in every rendering and lets nobody
replace. So a macro of that name goes in front of the template, which looks formats up in a variable.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime

from jinja2 import nodes

NAME, TIMES = "strftime_now", "linalign_times"
MACRO = f"{{% macro {NAME}(format) %}}{{{{ {TIMES}[format] }}}}{{% endmacro %}}\n"  # whose line's end is dropped


def formats_of(templates: Iterable[nodes.Template]) -> frozenset[str]:
    """The formats that templates show the time in; none where they don't, or make up a format as they go."""
    calls = [call for template in templates for call in template.find_all(nodes.Call) if _is_name(call.node, NAME)]
    arguments = [value for call in calls for value in (*call.args, *(named.value for named in call.kwargs))]
    if not all(isinstance(argument, nodes.Const) for argument in arguments):
        return frozenset()
    return frozenset(str(argument.value) for argument in arguments if isinstance(argument, nodes.Const))


def held_still(template: str) -> str:
    """The template, that is to be rendered with `variables` beside its own."""
    return MACRO + template


def variables(formats: Iterable[str], now: datetime) -> Mapping[str, object]:
    return {TIMES: {form: now.strftime(form) for form in formats}}


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name
