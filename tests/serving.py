"""Fixtures that start real servers. tests/fixtures.py registers them as a plugin."""

import contextlib
import dataclasses
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import uvicorn

from linalign import Engine, EngineConfig
from linalign.alignment_core.loading.checkpoint import EMBEDDED_ID
from linalign.server.app import create_app
from linalign.server.local_engine import LocalEngine
from linalign.server.settings import Settings
from tests import fork_server
from tests.counts import LONG_RUN
from tests.engines import tiny_pair

KEY = "first-key"
SLEEPING = """
import time
from linalign.alignment_core.execution.model_runner import ModelRunner
forward_of_small_model = ModelRunner.forward
def forward_of_larger_model(self, step):
    time.sleep(0.005 + 0.0003 * step.num_tokens)
    return forward_of_small_model(self, step)
ModelRunner.forward = forward_of_larger_model
"""


def _ports():
    """Ports of this xdist worker, below the system's ephemeral range, so that no other process takes one before the
    server binds it.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw3").removeprefix("gw"))
    first, start = 20_000 + 3000 * (number % 4), random.randrange(3000)
    return itertools.cycle([first + (start + i) % 3000 for i in range(3000)])


PORTS = _ports()


def free_port():
    return next(port for port in PORTS if _is_free(port))


def _is_free(port):
    with socket.socket() as listener, contextlib.suppress(OSError):
        listener.bind(("127.0.0.1", port))
        return True
    return False


@contextlib.contextmanager
def serving(*args, patch="", status=0, env=None, cold=LONG_RUN, **options):
    """Start a `linalign serve` process; yield its URL and the process once it is healthy.

    patch: Code that the process runs first, to inject a fault.
    status: The expected exit status.
    env: Variables in addition to the current environment.
    cold: True for a new interpreter, False for a fork that has already imported everything. Long runs use True.
    options: cwd, stdout, stderr; with `cold`, any option of Popen.
    """
    port = free_port()
    code, argv = (
        patch + "\nfrom linalign.server.commands.main import main; main()",
        ["serve", "--port", str(port), *args],
    )
    options["env"] = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
    if cold:
        started = subprocess.Popen([sys.executable, "-c", code, *argv], **options)
    else:
        started = fork_server.Process(code, ["linalign", *argv], **options)
    with started as process:
        url = f"http://127.0.0.1:{port}"
        try:
            await_health(url, process)
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == status


def await_health(url, process):
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, "the server ended before it was healthy"
        assert time.monotonic() < deadline, "the server did not become healthy"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url + "/health").status_code == 200:
                return
        time.sleep(0.02)


def await_metric(url, line):
    """Wait until /metrics contains the line. `line` is without the `linalign:` prefix."""
    deadline = time.monotonic() + 60
    while f"linalign:{line}\n" not in httpx.get(url + "/metrics").text:
        assert time.monotonic() < deadline, f"never {line}"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def serving_small(tokenizer, tmp_path_factory):
    """`serving` for tests that do not depend on the replies: a tiny random model with the embedded model's tokenizer
    and name. Its steps sleep as long as a larger model would compute, so they leave the CPU to other tests.
    """
    directory = tmp_path_factory.mktemp("small") / EMBEDDED_ID
    loaded, _ = tiny_pair(tokenizer, kernels=False, max_position_embeddings=8192)
    loaded.model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return lambda *args, patch="", **options: serving(str(directory), *args, patch=SLEEPING + patch, **options)


@pytest.fixture(scope="session")
def url(embedded):  # noqa: ARG001 - loads the model first, so that the server finds the converted copy
    with serving() as (url, _):
        yield url


@pytest.fixture(scope="session")
def client(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def closed(embedded):  # noqa: ARG001 - loads the model first, so that the server finds the converted copy
    with serving("--api-keys", f"{KEY},other-key") as (url, _):
        yield url


@pytest.fixture
def own_server(embedded):
    """The same application, served over a socket from this process, so that a test can inspect its engine.

    The model has no end-of-sequence tokens: replies end only at their length, so none ends before the test is done.
    """
    engine = Engine(dataclasses.replace(embedded, eos_token_ids=frozenset()), EngineConfig(num_pages=1100))
    config = uvicorn.Config(create_app(LocalEngine(engine), Settings()), port=free_port(), log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{config.port}", engine
    server.should_exit = True
    thread.join()
