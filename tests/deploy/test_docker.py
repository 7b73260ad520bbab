"""The Dockerfile, tested without a container engine: it is linted, its build context is built, and its final settings
run a real server in its own namespaces, as an unprivileged user, with only its cache and /tmp writable.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from linalign.alignment_core.loading.embedded import EMBEDDED_REQUIREMENT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STAGES = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text().replace("\\\n", " "), flags=re.MULTILINE)
CACHE = "/cache"

# The first process of a container without a network except loopback. Everything is read-only except two directories.
# $1: the cache. $2: the directory for temporary files. $3: the user id. The rest: the command.
CONTAINER = """
set -e
cache=$1 scratch=$2 user=$3
shift 3
"$PYTHON" -c 'import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 1))'
mount --bind "$cache" "$cache"
mount --bind "$scratch" "$scratch"
findmnt --raw --noheadings --output TARGET | while read -r target; do
    case $target in "$cache" | "$scratch" | /proc | /proc/*) ;; *) mount -o remount,bind,ro "$target" ;; esac
done
cd "$cache"
# It may read everything, as in an image; the checkout may be in a directory of root's.
exec setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --inh-caps=-all,+dac_read_search \\
    --ambient-caps=-all,+dac_read_search --bounding-set=-all,+dac_read_search "$@"
"""
ASK = """
import httpx
body = {"model": "smollm2", "messages": [{"role": "user", "content": "a"}], "principle": "b", "max_tokens": 5}
httpx.post("http://127.0.0.1:8000/v1/chat/completions", json=body).raise_for_status()
"""

# Compiles without optimisation, which would take ten seconds.
COMPILER = """#!/bin/sh
for flag; do
    shift
    [ "$flag" = -O3 ] || set -- "$@" "$flag"
done
exec c++ "$@"
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can create namespaces and change the user id")


def argument(instruction):
    """An instruction of the image's last stage in exec form, as a list."""
    return json.loads(re.search(rf"^\s*{instruction} .*?(\[.*\])$", STAGES[-1], re.MULTILINE)[1])


def environment(cache):
    """Environment of the cpu image, with `cache` in place of /cache."""
    stages = [stage for stage in STAGES if re.match(r"base AS runtime-cpu|runtime-\$", stage)]
    assert len(stages) == 2
    lines = re.findall(r"^ENV (.*)$", "\n".join(stages), re.MULTILINE)
    pairs = dict(pair.split("=", 1) for line in lines for pair in shlex.split(line))
    pairs = {name: value.replace(CACHE, str(cache), value.startswith(CACHE)) for name, value in pairs.items()}
    return {**pairs, "PATH": pairs["PATH"].replace("/venv/bin", str(BIN)).replace("$PATH", os.environ["PATH"])}


@dataclass(frozen=True, slots=True)
class Container:
    unshare: subprocess.Popen
    environment: dict[str, str]
    log: Path

    @property
    def first(self):
        """Process id of its first process, in this namespace."""
        return Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text().strip()

    def run(self, *command):
        inside = ["nsenter", f"--net=/proc/{self.first}/ns/net", *command]
        return subprocess.run(inside, env=self.environment, capture_output=True, text=True, timeout=60)

    def stop(self):
        """Stop it like `docker stop`; returns its exit status."""
        subprocess.run(["kill", "-s", re.search(r"^STOPSIGNAL (\w+)$", STAGES[-1], re.MULTILINE)[1][3:], self.first])
        return self.unshare.wait(60)

    def wait_until(self, condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert self.unshare.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)


@pytest.fixture
def compiler():
    with tempfile.TemporaryDirectory() as folder:  # other users may enter it, unlike a tmp_path
        Path(folder).chmod(0o755)
        file = Path(folder) / "compiler"
        file.write_text(COMPILER)
        file.chmod(0o755)
        yield file


@pytest.fixture
def container(package, compiler, tmp_path):
    cache, scratch, log = tmp_path / "cache", tmp_path / "scratch", tmp_path / "log"
    for directory in (cache, scratch):
        directory.mkdir()
        directory.chmod(0o1777)
    variables = environment(cache) | {
        "CXX": str(compiler),
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{package}:{ROOT}",
        "TMPDIR": str(scratch),
    }
    namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc"]
    command = ["sh", "-c", CONTAINER, "sh", str(cache), str(scratch), "54321"]
    command += [*argument("ENTRYPOINT"), *argument("CMD")]
    with (
        log.open("w") as stderr,
        subprocess.Popen(namespaces + command, env=variables, stderr=stderr) as unshare,
    ):
        container = Container(unshare, variables, log)
        yield container
        if unshare.poll() is None:  # the test failed; --kill-child does not reach a child with another user id
            subprocess.run(["kill", "-s", "KILL", *container.first.split(), str(unshare.pid)], check=True)
    print(log.read_text())


@needs_root
def test_an_unprivileged_user_with_only_a_cache_can_serve(container, tmp_path):
    check = argument("HEALTHCHECK")
    assert container.run(*check).returncode == 1  # the server does not listen yet
    container.wait_until(lambda: container.run(*check).returncode == 0)
    answer = container.run(sys.executable, "-c", ASK)
    assert answer.returncode == 0, answer.stderr
    status = Path(f"/proc/{container.first}/status").read_text()
    assert re.search(r"^Uid:\s+54321\s+54321", status, re.MULTILINE)
    assert re.search(r"^NSpid:\s+\d+\s+1$", status, re.MULTILINE)
    mounts = [line.split() for line in Path(f"/proc/{container.first}/mountinfo").read_text().splitlines()]
    uppermost = {mount[4]: mount[5].split(",") for mount in mounts if not mount[4].startswith("/proc")}
    writable = {path for path, options in uppermost.items() if "rw" in options}
    assert writable == {f"{tmp_path}/cache", f"{tmp_path}/scratch"}
    cached = sorted(path.name for path in (tmp_path / "cache" / "linalign").iterdir())
    assert [name.split("-")[0] for name in cached] == ["kernels", "smollm2"]
    assert "can't be cached" not in container.log.read_text()
    assert container.stop() == 0


@needs_root
def test_a_server_that_is_loading_stops_on_sigterm(container):
    container.wait_until(lambda: "Converting" in container.log.read_text())
    assert container.stop() == 0
    assert "Uvicorn running" not in container.log.read_text()


def test_hadolint_finds_nothing():
    linted = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("variant", ["cuda", "cpu"])
def test_an_image_installs_the_projects_requirements(variant):
    script = [sys.executable, ROOT / "deploy/docker/requirements.py", variant, "ray"]
    lines = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(lines) >= {*project["dependencies"], *extras["otel"], *extras["ray"]}
    assert (set(extras["cuda"]) <= set(lines)) == (variant == "cuda")
    assert any(line.startswith("torch==") and line.endswith("+cpu") for line in lines) == (variant == "cpu")
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert EMBEDDED_REQUIREMENT in dockerfile
    assert "install -c constraints.txt -r requirements.txt" in dockerfile


@pytest.mark.parametrize("extras", ["nope", "ray,dev"])
def test_extras_that_do_not_exist_for_images_are_refused(extras):
    script = [sys.executable, ROOT / "deploy/docker/requirements.py", "cpu", extras]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no extra {extras.split(',')[-1]} for an image: eval, cuda, ray, otel" in done.stderr


def test_the_build_context_is_complete_and_minimal(tmp_path):
    context = tmp_path / "context"
    included = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in included:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, context / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, context / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, context], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = [name for name in included if (ROOT / name).is_dir()]
    tracked = subprocess.run(["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=True)
    sources = {str((ROOT / name).resolve().relative_to(ROOT)) for name in installed}
    assert sources == {name for name in tracked.stdout.splitlines() if not (ROOT / name).is_symlink()}
