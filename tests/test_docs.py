"""Docs name files and identifiers that exist, and refer to nothing that a reader can't open."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
PAGES = [name for name in TRACKED if name.endswith(".md") and not name.startswith("docs/results/")]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
NAMES = re.findall(r"`([^`\n]+)`", ARCHITECTURE)
CODE = "\n".join((ROOT / name).read_text() for name in TRACKED if re.match(r"(alignment_core|server)/.*\.py$", name))


def tables():
    """Files in the table of packages, which stand there without their folder."""
    for folder, files in re.findall(r"^\| `(\w+/)` \|[^|]*\|([^|]*)\|$", ARCHITECTURE, re.MULTILINE):
        yield from ((f"alignment_core/{folder}", name) for name in re.findall(r"`(\w+\.\w+)`", files))


def test_the_table_of_packages_is_complete():
    listed = {folder + name for folder, name in tables()}
    packages = {folder for folder, _ in tables()}
    there = {name for name in TRACKED if name.startswith(tuple(packages)) and not name.endswith("__init__.py")}
    assert listed == there


@pytest.mark.parametrize("name", sorted({name for name in NAMES if re.fullmatch(r"[\w/.-]+\.(py|cpp|md)", name)}))
def test_the_architecture_names_files_that_exist(name):
    inside = {Path(found).name for found in TRACKED}
    assert (ROOT / name).exists() or (ROOT / "alignment_core" / name).exists() or ("/" not in name and name in inside)


@pytest.mark.parametrize("name", sorted({name for name in NAMES if re.fullmatch(r"_?[A-Za-z]+[._]\w[\w.]*", name)}))
def test_the_architecture_names_identifiers_that_exist(name):
    if not re.search(r"\.(py|cpp|md)$", name):
        for part in name.removeprefix("linalign.").split("."):
            assert re.search(rf"\b{part}\b", CODE), part


ANSWERS = ARCHITECTURE[ARCHITECTURE.index("## Where would you change") :]
PLACES = re.findall(r"`([\w/]+\.py)` \(((?:`\w+`(?:, )?)+)\)", ANSWERS)


@pytest.mark.parametrize(("file", "names"), PLACES)
def test_the_answers_name_identifiers_of_their_files(file, names):
    for name in re.findall(r"\w+", names):
        assert re.search(rf"\b{name}\b", (ROOT / "alignment_core" / file).read_text()), name


@pytest.mark.parametrize("page", PAGES)
def test_links_have_a_target(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_no_text_refers_to_documents_outside_the_repository():
    texts = [name for name in TRACKED if re.search(r"\.(py|md|js|cpp|toml|yaml)$", name) and (ROOT / name).is_file()]
    found = [name for name in texts if re.search(r"\bDESIGN\b|\b[Ii]ssue \d+\b", (ROOT / name).read_text())]
    assert set(found) <= {"tests/test_docs.py"}


def test_every_decision_is_in_the_index_under_its_title():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    titles = [re.match(r"# (\d+)\. (.+)\n", page.read_text()).groups() for page in pages]
    lines = [
        f"| [{number}](decisions/{page.name}) | {title} |" for page, (number, title) in zip(pages, titles, strict=True)
    ]
    assert index[index.index("| [1]") :].splitlines() == lines
