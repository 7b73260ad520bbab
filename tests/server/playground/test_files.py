"""Files that are shipped, and the README's pictures."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import expect

from linalign.server.routes.playground import FOLDER
from tests.server.playground.browsing import ROOT, opened

pytestmark = pytest.mark.slow


def test_vendored_files_equal_the_packages():
    """`make vendor` updates them."""
    vendor, packages = FOLDER / "vendor", ROOT / ".venv/playground/node_modules"
    dependencies = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    files = [file.relative_to(vendor) for file in vendor.rglob("*") if file.is_file()]
    assert {file.parts[0] for file in files} == set(dependencies)
    for file in files:
        assert (vendor / file).read_bytes() == (packages / file).read_bytes(), file
    for name, version in dependencies.items():
        assert json.loads((packages / name / "package.json").read_text())["version"] == version
        assert (vendor / name / "LICENSE").is_file()


def test_the_wheel_has_the_page(tmp_path):
    clean = tmp_path / "clean"  # without the results of earlier builds
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clean, symlinks=True, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, clean]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert {f"linalign/server/playground/{file.relative_to(FOLDER)}" for file in files} <= inside


# The README's pictures: `make pictures` writes them to docs/images


@pytest.mark.long
@pytest.mark.parametrize("view", ["compare", "why", "sweep"])
def test_picture(browser, url, tmp_path, view):
    folder = Path(os.environ.get("PICTURES", tmp_path))
    with opened(browser, url, view) as page:
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".status")).to_contain_text("complete")
        if view == "why":
            page.locator(".token").filter(has_text="bike").hover()
        page.screenshot(path=folder / f"playground-{view}.png", full_page=view == "sweep")
    assert (folder / f"playground-{view}.png").stat().st_size > 20_000
