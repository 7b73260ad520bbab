"""Imports have one direction: a package imports only from itself and from the packages in lower layers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom to the top. A layer is one package, or one or several modules.
CORE = (
    ("errors", "transfer", "disk_cache", "engine_config", "methods"),
    ("request",),
    ("output",),
    ("text",),
    ("scheduling",),
    ("attention",),
    ("cpu",),
    ("execution",),
    ("loading",),
    ("decoding",),
    ("pending_step", "memory"),
    ("loop",),
    ("assembly",),
    ("engine",),
)
SERVER = (
    ("deltas",),
    ("harmony",),
    ("address", "command_line", "core_errors", "engine_client", "hosts", "http_protocol", "keys", "logs", "reasoning"),
    ("local_engine", "metrics", "shutdown", "tool_calls", "tracing"),
    ("exchange", "settings", "settings_loading", "tool_grammars"),
    ("protocol",),
    ("middleware", "response_store"),
    ("presets", "state"),
    ("models", "threads"),
    ("alignment_sources",),
    ("replies",),
    ("routes",),
    ("app",),
    ("commands",),
)
TREES = {"alignment_core": (CORE, ()), "server": (SERVER, ("linalign", "linalign.alignment_core"))}


def layer_of(layers, module):
    """The number of the layer that has the module or its package."""
    (number,) = [number for number, names in enumerate(layers) if module.partition(".")[0] in names]
    return number


def modules():
    for tree in TREES:
        for file in sorted((ROOT / tree).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT / tree).with_suffix("").parts).removesuffix("__init__").rstrip(".")
            if name:
                yield pytest.param(tree, name, file, id=f"{tree}.{name}")


@pytest.mark.parametrize(("tree", "name", "file"), modules())
def test_a_module_imports_only_from_its_layer_and_below(tree, name, file):
    """Imports only for types do not count."""
    layers, foreign = TREES[tree]
    prefix = f"linalign.{tree}."
    code = ast.parse(file.read_text())
    skipped = {
        id(node)
        for block in ast.walk(code)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    imports = [
        (node.module, alias.name)
        for node in ast.walk(code)
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").startswith("linalign")
        for alias in node.names
    ]
    for module, imported in imports:
        path = f"{module}.{imported}"
        if path.startswith(prefix):
            assert layer_of(layers, path.removeprefix(prefix)) <= layer_of(layers, name), path
        elif (name, module) != ("commands.main", "linalign.evaluation"):  # the command `linalign eval`
            assert module in foreign or module.startswith("linalign.alignment_core."), path
            assert foreign, path  # the core imports neither the public names nor the server
