"""A model in two processes (gloo): replies equal those of one process, and failures end in errors, never in a hang."""

import ast
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

import alignment_core
import server
from linalign import LoadingError, load
from linalign.alignment_core.attention.paged_batch import Plan
from linalign.alignment_core.execution.model_runner import RunnerConfig
from linalign.alignment_core.execution.process_messages import pack, unpack
from linalign.alignment_core.scheduling.scheduler import Row
from linalign.alignment_core.scheduling.sequence import Branch
from tests import fork_server
from tests.counts import LONG_RUN
from tests.engines import prompts, tiny_pair
from tests.oracle import Setting
from tests.server.test_faults import chat
from tests.serving import serving

pytestmark = pytest.mark.slow

# Followers are forks too. They are then not children of rank 0, so their process id is written to a file.
FORKED = """
import os, pathlib, types
from linalign.alignment_core.execution import followers
from tests import fork_server
def popen(*args, **options):
    process = fork_server.popen(*args, **options)
    pathlib.Path(os.environ.get("FOLLOWER", os.devnull)).write_text(str(process.pid))
    return process
followers.subprocess = types.SimpleNamespace(**vars(followers.subprocess) | {"Popen": popen})
"""
SCRIPT = """
import json, os, signal, sys
from tests.engines import GREEDY, make_engine, prompts, run_all, token_ids
from linalign import load

loaded = load(sys.argv[1], tensor_parallel_size=2)
config = {"num_speculative_tokens": int(sys.argv[2]), "static": "static" in sys.argv}
engine = make_engine(loaded, page_size=4, num_pages=45, **config)
(follower,) = loaded.followers._processes
print(json.dumps({
    "replies": [token_ids(outputs) for outputs in run_all(engine, [(prompt, GREEDY) for prompt in prompts()])],
    "width": engine.runner._keys[0].shape[2],
    "preemptions": engine.scheduler.num_preemptions,
    "follower": follower.pid,
}), flush=True)
if "kill" in sys.argv:
    with engine:
        follower.send_signal(signal.SIGKILL)
        follower.wait()
        engine.submit(prompts()[1], GREEDY, lambda output: print(output.finish_reason, flush=True))
        engine._thread.join(60)
        print(type(engine.error).__name__, engine.alive, flush=True)
if "vanish" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    loaded, oracle = tiny_pair(tokenizer, vocab_size=300, kernels=False)
    path = tmp_path_factory.mktemp("checkpoint")
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return str(path), oracle


def run(checkpoint, *arguments, cold=LONG_RUN, **environment):
    """Run SCRIPT and return its first line (JSON) and its other lines. cold: Use fresh interpreters.

    It must exit with status 0, or be killed if "vanish" is among the arguments.
    """
    options = {"env": {**os.environ, **environment}, "timeout": 240}
    if cold:
        command = [sys.executable, "-c", SCRIPT, checkpoint, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, **options)
    else:
        result = fork_server.run(FORKED + SCRIPT, checkpoint, *arguments, **options)
    assert result.returncode == (-9 if "vanish" in arguments else 0), result.stderr
    first, *rest = result.stdout.splitlines()
    return json.loads(first), rest


def is_gone(pid):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("arguments", [("0",), ("4", "static")], ids=str)
def test_two_processes_equal_the_oracle(checkpoint, arguments):
    path, oracle = checkpoint
    seen, _ = run(path, *arguments)
    assert seen["width"] == 1  # one of two key heads
    assert seen["preemptions"] > 0
    for prompt, tokens in zip(prompts(), seen["replies"], strict=True):
        assert len(tokens) == 12
        assert oracle.check_greedy(prompt, Setting(prompt.ratios, prompt.weights), tokens) <= 1
    assert is_gone(seen["follower"])


def test_a_dead_follower_ends_the_engine_with_an_error(checkpoint):
    _, rest = run(checkpoint[0], "0", "kill")
    assert rest == ["error", "FollowerDied False"]


def test_followers_end_when_rank_0_is_killed(checkpoint):
    seen, _ = run(checkpoint[0], "0", "vanish")
    assert is_gone(seen["follower"])


def test_models_that_can_not_be_split_are_refused():
    code = "from linalign import load; load(None, tensor_parallel_size=2)"
    result = fork_server.run(code)
    assert result.returncode == 1
    assert "LoadingError: smollm2 has 3 key heads, which 2 processes can't share evenly" in result.stderr
    with pytest.raises(LoadingError, match="GGUF"):
        load("model.gguf", tensor_parallel_size=2)
    with pytest.raises(LoadingError, match="one GPU each"):
        load("model", device="cuda:1", tensor_parallel_size=2)


# Loopback only, and no pickle


KINDS = {"Plan": Plan, "RunnerConfig": RunnerConfig}


def test_messages_arrive_as_they_were_sent():
    row = Row(Branch(tokens=[5, 6, -1], pages=[3, 9]), 1, 5, (8, 9))
    empty = Plan.of([row], [], 4)
    sent = [RunnerConfig(4, 512, 8, "fp8", True), 45, Plan.of([row], [(row, -1), (row, -2)], 4), empty, None]
    stream = io.BytesIO(b"".join(map(pack, sent)))
    for message in sent:
        received = unpack(stream, KINDS)
        assert type(received) is type(message)
        if not isinstance(message, Plan):
            assert received == message
            continue
        for name in Plan.__slots__:
            value, expected = getattr(received, name), getattr(message, name)
            assert type(value) is type(expected)
            assert np.array_equal(value, expected)
            assert getattr(value, "dtype", None) == getattr(expected, "dtype", None)
            assert not isinstance(value, np.ndarray) or value.flags.writeable
    with pytest.raises(EOFError):
        unpack(stream, KINDS)


def test_a_truncated_message_is_refused():
    whole = pack(RunnerConfig(4, 512))
    for length in range(len(whole)):
        with pytest.raises(EOFError):
            unpack(io.BytesIO(whole[:length]), KINDS)


WATCH = """
import sys
def hook(event, arguments):
    if event == "pickle.find_class":
        with open({log!r}, "a") as log:
            log.write(repr(arguments) + "\\n")
sys.addaudithook(hook)
"""


def test_no_process_unpickles_anything(checkpoint, tmp_path):
    """Python's audit hook reports it: a pickle that can do more than hold numbers and strings looks up a class."""
    log = tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(WATCH.format(log=str(log)))
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    probe = "import pickle, datetime; pickle.loads(pickle.dumps(datetime.date(2000, 1, 1)))"
    subprocess.run([sys.executable, "-c", probe], env={**os.environ, "PYTHONPATH": path}, check=True)
    assert "datetime" in log.read_text()  # the hook works
    log.unlink()
    seen, _ = run(checkpoint[0], "0", cold=True, PYTHONPATH=path)
    assert len(seen["replies"]) == len(prompts())
    assert not log.exists(), log.read_text()


FORBIDDEN = re.compile(
    r"(_?pickle|cPickle|cloudpickle|dill|marshal|shelve|joblib|multiprocessing|torch\.multiprocessing)(\.|$)"
)
BY_PICKLE = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"}
BY_PICKLE |= {"send_object_list", "recv_object_list", "allow_pickle", "weights_only"}


def test_no_module_imports_pickle():
    files = [path for package in (alignment_core, server) for path in Path(package.__file__).parent.rglob("*.py")]
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            assert not any(map(FORBIDDEN.match, names)), (path, names)
            assert not BY_PICKLE & {getattr(node, name, None) for name in ("attr", "id", "arg")}, path
            loads = isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name)
            assert not (loads and node.value.id in ("torch", "np", "numpy")), path


@pytest.fixture(scope="module")
def chatty_checkpoint(tokenizer, tmp_path_factory):
    """A checkpoint whose vocabulary covers any text."""
    loaded, _ = tiny_pair(tokenizer, kernels=False)
    path = tmp_path_factory.mktemp("speaking") / "smollm2"  # the model name that `chat` requests
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


@contextlib.contextmanager
def in_two_parts(path, **options):
    """Start a server of two processes; yield its URL, the process of rank 0 and the follower's process id."""
    args = (str(path), "--tensor-parallel-size", "2")
    if LONG_RUN:
        with serving(*args, **options) as (url, process):
            children = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
            (follower,) = subprocess.run(children, capture_output=True, text=True, check=True).stdout.split()
            yield url, process, int(follower)
        return
    with (
        tempfile.NamedTemporaryFile("r") as pid_file,
        serving(*args, patch=FORKED, env={"FOLLOWER": pid_file.name}, **options) as (url, process),
    ):
        yield url, process, int(pid_file.read())


def test_processes_listen_only_on_loopback(chatty_checkpoint):
    with in_two_parts(chatty_checkpoint) as (_, process, follower):
        sockets = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
        sockets_of_server = [line for line in sockets if f"pid={process.pid}," in line or f"pid={follower}," in line]
        assert len(sockets_of_server) > 3  # HTTP, the store, the collective operations
        assert {line.split()[3].rpartition(":")[0] for line in sockets_of_server} == {"127.0.0.1"}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("busy", [False, True])
def test_no_follower_outlives_its_server(chatty_checkpoint, how, busy):
    status = 0 if how == signal.SIGTERM else -signal.SIGKILL
    with in_two_parts(chatty_checkpoint, status=status) as (url, process, follower):
        ended = []

        def ask():
            with contextlib.suppress(httpx.TransportError):
                ended.append(chat(url, max_tokens=400 if busy else 2))

        asking = threading.Thread(target=ask)
        asking.start()
        if busy:
            while "linalign:num_requests_running 1.0" not in httpx.get(url + "/metrics").text:
                time.sleep(0.01)
        else:
            asking.join()
        process.send_signal(how)
        assert process.wait(60) == status
        asking.join()
        assert is_gone(follower)
        assert len(ended) == (how == signal.SIGTERM or not busy)
