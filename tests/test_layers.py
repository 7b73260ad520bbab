"""Imports of the core point one way: a package imports from itself and from the packages before it."""

import ast
from pathlib import Path

import pytest

CORE = Path(__file__).parents[1] / "alignment_core"
PREFIX = "linalign.alignment_core."
# From the bottom to the top. A module that is alone in its layer is named by its file.
LAYERS = (
    ("errors", "transfer", "disk_cache", "engine_config", "decoding.methods"),
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


def layer_of(module):
    """The number of a module's layer; a layer that names the module itself goes before one that names its package."""
    found = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(found)[1]


def modules():
    for file in sorted(CORE.rglob("*.py")):
        name = ".".join(file.relative_to(CORE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            yield pytest.param(name, file, id=name)


@pytest.mark.parametrize(("name", "file"), modules())
def test_a_module_imports_only_from_its_layer_and_below(name, file):
    """Imports for types alone do not count."""
    tree = ast.parse(file.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    imported = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").startswith("linalign")
        for alias in node.names
    ]
    assert all(module.startswith(PREFIX) for module in imported)  # never the public face, never the server
    above = [module for module in imported if layer_of(module.removeprefix(PREFIX)) > layer_of(name)]
    assert above == []
