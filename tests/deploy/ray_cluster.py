"""A real Ray cluster on this machine: HTTP through Ray's proxy, each engine in its own process."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import yaml

from tests.deploy.faulty import HOLD
from tests.serving import free_port

ROOT = Path(__file__).parents[2]
SEQS = 4  # most running sequences of each replica, and most queued requests
LOGS = Path("/tmp/ray/session_latest/logs")
PRINCIPLE = {"principle": "Mention the sea.", "alignment_ratio": 2}


def application(name, import_path="tests.deploy.faulty:build", args=None, **engine):
    return {
        "name": name,
        "route_prefix": "/" + name,
        "import_path": import_path,
        "args": {"device": "cpu", **(args or {})},
        "deployments": [{"name": "EngineReplica", **engine}],
    }


PAIR = application("pair", args={"max_num_seqs": SEQS, "max_queued_requests": SEQS}, num_replicas=2)


@contextlib.contextmanager
def cluster_of(applications, folder):
    """Start a cluster with these applications; yield its URL. Files in `folder` trigger faults."""
    port = free_port()
    config = folder / "config.yaml"
    http = {"host": "127.0.0.1", "port": port}
    config.write_text(yaml.safe_dump({"http_options": http, "applications": applications}))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "FAULTS": str(folder),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # More CPUs than exist, so that all replicas are placed.
    code = "import ray; ray.init(num_cpus=16, namespace='serve', log_to_driver=False); "
    code += "from ray.serve.scripts import cli; cli()"
    command = [sys.executable, "-c", code, "run", str(config)]
    with subprocess.Popen(command, env=environment, cwd=folder) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for one in applications:
                wait(lambda name=one["name"]: replicas(f"{url}/{name}"), process, seconds=900)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def wait(condition, process=None, seconds=300):
    """Wait until the condition is true, and return its value. Connection errors count as false."""
    deadline = time.monotonic() + seconds
    while True:
        assert process is None or process.poll() is None, "the cluster has ended"
        assert time.monotonic() < deadline, "it never came"
        with contextlib.suppress(httpx.TransportError):
            if result := condition():
                return result
        time.sleep(0.1)


def metric(url, name):
    """The metric's values, by replica."""
    text = httpx.get(url + "/metrics", timeout=60).text
    return {
        replica: float(value)
        for replica, value in re.findall(rf'^linalign:{name}{{replica="(\w+)"}} (\S+)$', text, re.MULTILINE)
    }


def replicas(url):
    return set(metric(url, "num_requests_running"))


def chat(url, text="Tell me about towns.", messages=None, timeout=300, **fields):
    body = {"model": "smollm2", "messages": messages or [{"role": "user", "content": text}], "temperature": 0}
    return httpx.post(f"{url}/v1/chat/completions", json={**body, **PRINCIPLE, **fields}, timeout=timeout)


def sdk(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300)


class Stream(threading.Thread):
    """Reads a streamed reply in a thread.

    text, num_tokens: Received so far. begun: Set at the first text or an error. error: The API error that ended it.
    """

    def __init__(self, url, question, max_tokens, **fields):
        super().__init__(daemon=True)
        self.question, self.text, self.num_tokens, self.error = question, "", 0, None
        self.begun = threading.Event()
        self._url, self._max_tokens, self._fields = url, max_tokens, fields
        self.start()

    def run(self):
        try:
            for chunk in sdk(self._url).chat.completions.create(
                model="smollm2",
                messages=[{"role": "user", "content": self.question}],
                temperature=0,
                max_tokens=self._max_tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={**PRINCIPLE, "ignore_eos": True, **self._fields},
            ):
                if chunk.choices and chunk.choices[0].delta.content:
                    self.text += chunk.choices[0].delta.content
                    self.begun.set()
                if chunk.usage:
                    self.num_tokens = chunk.usage.completion_tokens
        except openai.APIError as error:
            self.error = error
            self.begun.set()


def pid_of(replica):
    """Process id of the replica, found by its open log file."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(f"EngineReplica_{replica}" in os.readlink(file) for file in (folder / "fd").iterdir()):
                name = (folder / "cmdline").read_bytes()
                if name.startswith(b"ray::ServeReplica"):
                    return int(folder.name)
    raise AssertionError(f"no process has the log of {replica}")


@contextlib.contextmanager
def held(folder):
    """Hold the engines of the cluster with this folder: requests start, but hardly continue, inside the block."""
    (folder / HOLD).touch()
    try:
        yield
    finally:
        (folder / HOLD).unlink()


def fill(url, about, num_tokens):
    """Fill two held replicas. Returns the running streams, the waiting ones, and the error of one that was refused."""
    running = []
    for number in range(2 * SEQS):  # one after the other, because a request without a replica counts as waiting
        running.append(Stream(url, f"Tell me about {number} {about}.", num_tokens))
        assert running[-1].begun.wait(60)
    others = [Stream(url, f"Tell me about {number} other {about}.", num_tokens) for number in range(SEQS + 1)]
    (refused,) = wait(lambda: [stream for stream in others if stream.error], seconds=20)
    others.remove(refused)
    assert not any(stream.begun.is_set() for stream in others)
    return running, others, refused.error


def expect_replacement(cluster, fault):
    """An engine of the pair fails before it has started a request: another replica serves it, and a new one starts."""
    url, trigger = cluster[0] + "/pair", cluster[1] / str(fault)
    before = wait(lambda: len(names := replicas(url)) == 2 and names)
    expected = chat(url, "Tell me about hills.", max_tokens=12)
    trigger.touch()
    reply = chat(url, "Tell me about hills.", max_tokens=12, seed=fault)
    assert not trigger.exists()  # the fault was triggered
    assert reply.json()["choices"] == expected.json()["choices"]
    wait(lambda: len(now := replicas(url)) == 2 and len(now - before) == 1)
