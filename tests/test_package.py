"""The sdist and the wheel: their contents, and the installed wheel far from the source tree."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import linalign
from tests.serving import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = (
    "import sys; from setuptools import build_meta as b; [getattr(b, 'build_' + w)(sys.argv[1]) for w in sys.argv[2:]]"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with sdist and wheel, built as a build frontend does, from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    junk = source / "tests" / "__pycache__" / "junk.pyc"
    junk.parent.mkdir()
    junk.touch()
    subprocess.run([sys.executable, "-c", BUILD, str(folder), "sdist"], cwd=source, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()  # build the wheel from the sdist, to check that the sdist is complete
    subprocess.run([sys.executable, "-c", BUILD, str(folder), "wheel"], cwd=unpacked, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def sources():
    """Tracked regular files, as paths relative to the repository."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.splitlines()
    return {name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink()}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with only the wheel installed. Its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    (path,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder), str(path)]
    subprocess.run(pip, check=True)
    where = [sys.executable, "-c", "import linalign.server as server; print(server.__file__)"]
    result = subprocess.run(
        where, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert Path(result.stdout.strip()).is_relative_to(folder)  # not from the source tree
    return folder


def source_of(name):
    """The tracked file of an archive's path; paths under linalign/ are links."""
    return str((ROOT / name).resolve().relative_to(ROOT))


def command(installed, *args):
    return [sys.executable, str(installed / "bin" / "linalign"), *args]


@pytest.fixture
def elsewhere(tmp_path):
    """A working directory whose folders have the same names as ours."""
    for name in ("server", "alignment_core", "evaluation", "configs", "deploy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')")
    return tmp_path


def run(installed, elsewhere, *args):
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        command(installed, *args), cwd=elsewhere, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_only_runtime_files(wheel, sources):
    packaged = {source_of(name) for name in wheel.namelist() if ".dist-info/" not in name}
    packages = ("alignment_core/", "configs/", "deploy/ray/", "evaluation/", "linalign/__init__.py", "server/")
    assert packaged == {name for name in sources if name.startswith(packages)}
    assert {"alignment_core/py.typed", "alignment_core/cpu/kernels.cpp", "server/playground/index.html"} <= packaged


def test_one_import_name(wheel, installed, elsewhere):
    """No package exists outside linalign/."""
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert folders == {"linalign", f"linalign-{version('linalign')}.dist-info"}
    code = """
import importlib.util, sys
sys.path.remove("")  # the working directory has folders of these names
names = ("alignment_core", "configs", "deploy", "evaluation", "server")
print([name for name in names if importlib.util.find_spec(name)])
"""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_the_public_names():
    namespace = {}
    exec("from linalign import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(linalign.__all__) == linalign.MODULES.keys()
    objects = [namespace[name] for name in linalign.__all__ if name != "METHODS"]
    assert all(one.__module__.startswith("linalign.alignment_core.") for one in objects)


def test_the_wheel_has_all_licences(wheel, sources):
    licences = {name for name in sources if Path(name).name == "LICENSE"}
    packaged = {source_of(name.partition("/licenses/")[2]) for name in wheel.namelist() if "/licenses/" in name}
    assert packaged == licences
    vendored = {name.split("/")[3] for name in sources if name.startswith("server/playground/vendor/")}
    assert {name.split("/")[3] for name in licences if "vendor" in name} == vendored


def test_the_sdist_has_all_sources(built, sources):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {source_of(member.name.partition("/")[2]) for member in archive.getmembers() if member.isfile()}
    generated = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - generated <= sources
    assert sources - names == {".ci/run", ".gitignore"}
    assert not any(name.endswith((".pyc", ".safetensors", ".gguf")) for name in names)


def test_the_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Version"] == PROJECT["version"] == version("linalign")
    assert metadata["License-Expression"] == "Apache-2.0 AND BSD-3-Clause AND MIT"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_are_within_the_ranges_and_have_every_dependency():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(Requirement(line).name): next(iter(Requirement(line).specifier)) for line in lines}
    assert all(specifier.operator == "==" for specifier in pinned.values())
    extras = (texts for name, texts in PROJECT["optional-dependencies"].items() if name != "dev")
    for text in [*PROJECT["dependencies"], *(text for texts in extras for text in texts)]:
        requirement = Requirement(text)
        exact = [specifier.version for specifier in requirement.specifier if specifier.operator == "=="]
        if requirement.name != "triton":  # torch requires its own version
            versions = exact or [pinned[canonicalize_name(requirement.name)].version]
            assert requirement.specifier.contains(versions[0]), text


def test_help_and_version_from_any_directory(installed, elsewhere):
    assert run(installed, elsewhere, "--version") == f"linalign {PROJECT['version']}\n"
    assert "linalign serve" in run(installed, elsewhere, "--help")
    for name in ("serve", "chat", "bench", "eval"):
        assert f"usage: linalign {name}" in run(installed, elsewhere, name, "--help")


def test_the_installed_server_answers(installed, elsewhere, embedded):  # noqa: ARG001 - converts the model first
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    readme = (ROOT / "README.md").read_text()
    body = json.loads(re.search(r"^curl http.*? -d '(\{.*?\})'$", readme, re.S | re.M).group(1))
    with subprocess.Popen(command(installed, "serve", "--port", str(port)), cwd=elsewhere, env=env) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        try:
            while True:
                assert process.poll() is None, "the server ended before it was healthy"
                assert time.monotonic() < deadline, "the server did not become healthy"
                try:
                    if httpx.get(url + "/health").is_success:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            reply = httpx.post(url + "/v1/chat/completions", json={**body, "max_tokens": 4}, timeout=120).json()
            assert reply["usage"]["completion_tokens"] == 4
            assert httpx.get(url + "/version").json() == {"version": PROJECT["version"]}
            assert "smollm2:teacher" in [model["id"] for model in httpx.get(url + "/v1/models").json()["data"]]
            page = httpx.get(url + "/")
            assert page.is_success
            assert "module" in page.text
            assert httpx.get(url + "/playground/vendor/marked/lib/marked.esm.js").is_success
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
