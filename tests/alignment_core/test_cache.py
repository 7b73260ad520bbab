"""A broken cache directory: the server starts all the same, logs what failed, and leaves no half-written files.

The embedded model is cut down to one layer and 300 tokens, because converting all of it takes half a minute.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest

from linalign import Prompt, SamplingParams, load
from linalign.alignment_core import disk_cache
from linalign.alignment_core.cpu import kernels
from tests import fork_server
from tests.engines import make_engine, run_all, token_ids
from tests.server.test_faults import at_once, chat
from tests.serving import serving

pytestmark = pytest.mark.slow

# All test processes compile the kernels with these flags when the cache has none.
QUICK_KERNELS = """
from linalign.alignment_core.cpu import kernels
kernels.FLAGS = tuple(flag for flag in kernels.FLAGS if flag != "-O3")
"""
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def whole(package, tmp_path_factory):
    """The cache directory that the first start of a server (in a new interpreter) leaves, and that server's reply."""
    kernels.library()  # loads this process's own kernels, before a test redirects the cache
    home = tmp_path_factory.mktemp("whole")
    return home, reply(package, home, cold=True)


def reply(package, home, patch="", **options):
    environment = {"PYTHONPATH": str(package), "XDG_CACHE_HOME": str(home)}
    with serving(env=environment, patch=QUICK_KERNELS + patch, **options) as (url, _):
        return chat(url).json()["choices"][0]["message"]["content"]


@pytest.fixture
def home(whole, tmp_path):
    """A copy of that cache, for a test to damage."""
    shutil.copytree(whole[0], tmp_path / "home")
    return tmp_path / "home"


def model_in(home):
    (directory,) = (home / "linalign").glob("smollm2-*")
    return directory


def kernels_in(home):
    (directory,) = (home / "linalign").glob("kernels-*")
    return directory


# Damaged copies


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def a_file(directory):
    shutil.rmtree(directory)
    directory.write_text("not a directory")


def emptied(directory):
    shutil.rmtree(directory)
    directory.mkdir()


FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "packed.safetensors",
    "sizes.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
DAMAGES = {
    **{f"{name} is gone": lambda copy, name=name: (copy / name).unlink() for name in FILES},
    **{f"{name} is cut off": lambda copy, name=name: truncated(copy / name) for name in FILES},
    "weights of the right length": lambda copy: garbage(copy / "packed.safetensors"),
    "weights and floats of the right length": lambda copy: [garbage(file) for file in copy.glob("*.safetensors")],
    "a tokenizer of the right length": lambda copy: garbage(copy / "tokenizer.json"),
    "sizes that are none": lambda copy: (copy / "sizes.json").write_text("[]"),
    "a file": a_file,
    "nothing in it": emptied,
    "a link to nowhere": lambda copy: (shutil.rmtree(copy), copy.symlink_to("nowhere")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_copy_is_replaced_and_never_used(package, home, damage, monkeypatch, caplog):
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    caplog.set_level("INFO", "linalign.alignment_core.loading")
    assert sorted(path.name for path in model_in(home).iterdir()) == sorted(FILES)
    copy = model_in(home)
    damage(copy)
    answers = []
    for converts in (True, False):
        caplog.clear()
        loaded = load()
        assert ("Converting" in caplog.text) == converts
        prompt = Prompt((tuple(loaded.tokenizer("Where is the sea?")["input_ids"]),))
        answers.append(token_ids(run_all(make_engine(loaded, num_pages=20), [(prompt, PARAMS)])[0]))
        assert loaded.tokenizer.chat_template
    assert len(answers[0]) == 20
    assert answers[0] == answers[1]
    assert disk_cache.has(copy)
    assert not list((home / "linalign").glob(".*"))


def test_a_fresh_interpreter_replaces_a_damaged_copy_too(package, whole, home, tmp_path):
    """A fresh interpreter imports less than a fork has."""
    garbage(model_in(home) / "packed.safetensors")
    log = stderr_of(package, home, whole, tmp_path, cold=True)
    assert "damaged" in log
    assert disk_cache.has(model_in(home))


# Unusable directories


def a_file_instead(home):
    shutil.rmtree(home / "linalign")
    (home / "linalign").write_text("not a directory")


def read_only_and_empty(home):
    shutil.rmtree(home / "linalign")
    home.chmod(0o555)


def read_only_and_damaged(home):
    truncated(model_in(home) / "model.safetensors")
    (kernels_in(home) / "kernels.so").chmod(0)
    (home / "linalign").chmod(0o555)


def closed(home):
    (home / "linalign").chmod(0)


# Drops root's privileges, so that file modes apply to root too.
WITHOUT_PRIVILEGES = """
import ctypes
libc, head, data = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(head, data) == 0
data[0] &= ~0b110  # effective: neither CAP_DAC_OVERRIDE nor CAP_DAC_READ_SEARCH
assert libc.capset(head, data) == 0
"""


@pytest.mark.parametrize("fault", [a_file_instead, read_only_and_empty, read_only_and_damaged, closed])
def test_an_unusable_cache_only_costs_time(package, whole, home, fault, tmp_path):
    fault(home)
    before = listing(home)
    try:
        log = stderr_of(package, home, whole, tmp_path, patch=WITHOUT_PRIVILEGES)
    finally:
        for path in (home, home / "linalign"):
            if path.exists():
                path.chmod(0o755)
    assert "converted model can't be cached" in log
    assert "kernels can't be cached" in log
    assert "Traceback" not in log
    assert listing(home) == before


def stderr_of(package, home, whole, tmp_path, **options):
    """The stderr of a server that must give the expected reply."""
    with (tmp_path / "stderr").open("w+") as stderr:
        assert reply(package, home, stderr=stderr, **options) == whole[1]
        stderr.seek(0)
        return stderr.read()


def listing(home):
    return sorted((str(path), path.stat().st_size) for path in home.rglob("*") if path.is_file())


# Full disks


def test_a_disk_that_is_full_during_the_write_only_costs_time(package, whole, home, tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: 4 MB of the 15 MB, so that the file is begun."""
    shutil.rmtree(model_in(home))
    limit = 4 << 20
    log = stderr_of(
        package,
        home,
        whole,
        tmp_path,
        patch=f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))",
    )
    assert "converted model can't be cached" in log
    assert "Traceback" not in log
    assert [path.name for path in (home / "linalign").iterdir()] == [kernels_in(home).name]


@pytest.mark.parametrize("megabytes", [0.1, 6])
def test_a_real_full_disk(package, whole, tmp_path, megabytes):
    """A disk of 100 kB, too small for the kernels, and one of 6 MB, too small for the model."""
    home = tmp_path / "home"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(home)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here; the test above covers the same case")
    try:
        if megabytes > 1:
            shutil.copytree(kernels_in(whole[0]), home / "linalign" / kernels_in(whole[0]).name)
        log = stderr_of(package, home, whole, tmp_path)
        left = [path.name.split("-")[0] for path in (home / "linalign").iterdir()]
    finally:
        subprocess.run(["umount", str(home)], check=True)
    assert "converted model can't be cached" in log
    assert ("kernels can't be cached" in log) == (megabytes < 1)
    assert "Traceback" not in log
    assert left == ([] if megabytes < 1 else ["kernels"])


# Killed processes and concurrent processes


def loading(package, home, patch=""):
    """Load the embedded model in another process."""
    code = QUICK_KERNELS + patch + "\nfrom linalign import load; load()"
    environment = {**os.environ, "PYTHONPATH": f"{package}:{os.getcwd()}", "XDG_CACHE_HOME": str(home)}
    return fork_server.run(code, env=environment)


KILL = "import os, signal; {}{} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    "when",
    [("import transformers; ", "transformers.PreTrainedTokenizerFast.save_pretrained"), ("", "os.fsync")],
    ids=["half way", "before it gets its name"],
)
def test_partial_copies_of_a_killed_process_are_deleted(package, home, when):
    shutil.rmtree(model_in(home))
    assert loading(package, home, KILL.format(*when)).returncode == -signal.SIGKILL
    (left,) = (path for path in (home / "linalign").iterdir() if path != kernels_in(home))
    assert left.name.startswith(".")
    assert list(left.rglob("model.safetensors"))
    assert loading(package, home).returncode == 0  # the unfinished copy might belong to a running process
    assert left.exists()
    assert disk_cache.has(model_in(home))
    long_ago = time.time() - 2 * disk_cache.ABANDONED
    os.utime(left, (long_ago, long_ago))
    assert loading(package, home).returncode == 0
    assert not left.exists()
    assert disk_cache.has(model_in(home))
    assert disk_cache.has(kernels_in(home))


def test_three_servers_that_start_on_one_empty_cache_at_once_answer_the_same(package, whole, tmp_path):
    assert at_once(*[lambda: reply(package, tmp_path)] * 3) == [whole[1]] * 3
    assert disk_cache.has(model_in(tmp_path))
    assert disk_cache.has(kernels_in(tmp_path))
    assert len(list((tmp_path / "linalign").iterdir())) == 2


def test_concurrent_readers_never_see_a_partial_file(tmp_path):
    """Eight threads add, discard and read the same entry."""
    target, ends, seen = tmp_path / "cache" / "name", time.monotonic() + 3, []

    def write(directory):
        for number in range(5):
            (directory / f"{number}").write_bytes(bytes(1000))

    def work(number):
        while time.monotonic() < ends:
            if number % 4 == 0:
                disk_cache.discard(target) if target.parent.exists() else None
            elif number % 4 == 1:
                seen.append(disk_cache.has(target))
            else:
                with contextlib.suppress(OSError):  # another thread discarded the entry meanwhile
                    disk_cache.add(target, write)
            with contextlib.suppress(FileNotFoundError):
                assert [len((target / f"{number}").read_bytes()) for number in range(5)] == [1000] * 5

    failed = []
    threads = [threading.Thread(target=guarded, args=(work, number, failed)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert True in seen
    disk_cache.add(target, write)
    assert disk_cache.has(target)
    assert [path.name for path in target.parent.iterdir()] == ["name"]


def guarded(work, number, failed):
    try:
        work(number)
    except BaseException as error:
        failed.append(error)


# The kernels


BUILD = f"""
import logging; logging.basicConfig(level="INFO")
{QUICK_KERNELS}
print(kernels.library().linalign_encode.restype)
"""


def build(home):
    environment = {**os.environ, "XDG_CACHE_HOME": str(home)}
    built = fork_server.run(BUILD, env=environment, check=True)
    assert "c_int" in built.stdout
    assert "Traceback" not in built.stderr
    return built.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    home = tmp_path_factory.mktemp("built")
    assert "Compiling" in build(home)
    assert "Compiling" not in build(home)
    return home


@pytest.mark.parametrize(
    "damage",
    [
        lambda copy: truncated(copy / "kernels.so"),
        lambda copy: garbage(copy / "kernels.so"),
        lambda copy: (copy / "kernels.so").unlink(),
        emptied,
        a_file,
    ],
    ids=["cut off", "garbage", "gone", "empty", "a file"],
)
def test_damaged_kernels_are_compiled_again(built, damage):
    copy = kernels_in(built)
    damage(copy)
    log = build(built)
    assert "Compiling" in log
    assert "slower" not in log
    assert disk_cache.has(copy)
    assert [path.name for path in (built / "linalign").iterdir()] == [copy.name]


def test_kernels_without_a_cache_are_compiled_for_this_process(tmp_path):
    (tmp_path / "linalign").write_text("not a directory")
    for _ in range(2):
        log = build(tmp_path)
        assert "can't be cached" in log
        assert "slower" not in log
