"""Processes that need no time for imports: forks of one that has imported everything and run nothing.

Each is a real process with its own arguments, environment, files, signals and exit status. What a fork can't show is a
cold start: tests of that start an interpreter of their own.
"""

import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile

import torch

PRELOADED = (
    "alignment_core", "benchmarks", "evaluation.command", "jsonschema", "llguidance.hf", "openai", "server.app",
    "server.bench", "server.chat", "server.cli", "server.http_protocol", "server.shutdown", "server.tracing",
    "transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama", "uvicorn", "uvloop",
)  # fmt: skip
MOST_BYTES = 1 << 20  # of a request


class Process:
    """Python code in a process of its own; in a `with` block, it has ended when the block has.

    argv: sys.argv. env: all of its environment. stdin, stdout, stderr: files; None for those of this process.
    pid, poll, wait, send_signal, kill, returncode: as of subprocess.Popen.
    """

    def __init__(self, code, argv, *, env=None, cwd=None, stdin=None, stdout=None, stderr=None):
        self.args, self.returncode = argv, None
        self._channel, theirs = socket.socketpair()
        request = {"code": code, "argv": argv, "env": dict(env or os.environ), "cwd": str(cwd or os.getcwd())}
        with open(os.devnull, "r+b") as nothing, theirs:
            files = [
                nothing if file == subprocess.DEVNULL else file or standard
                for file, standard in ((stdin, 0), (stdout, 1), (stderr, 2))
            ]
            numbers = [file if isinstance(file, int) else file.fileno() for file in (*files, theirs)]
            socket.send_fds(_server(), [json.dumps(request).encode()], numbers)
        self.pid = int(self._channel.recv(16).decode())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
        self._channel.close()

    def poll(self):
        if self.returncode is None and select.select([self._channel], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = os.waitstatus_to_exitcode(int(self._channel.recv(16).decode()))
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(code, *argv, env=None, cwd=None, timeout=120, check=False):
    """As subprocess.run of `python -c CODE ARGV…`, with its output captured as text."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with Process(code, ["-c", *argv], env=env, cwd=cwd, stdout=stdout, stderr=stderr) as process:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        stdout.seek(0), stderr.seek(0)
        done = subprocess.CompletedProcess(process.args, process.returncode, stdout.read(), stderr.read())
    if check:
        assert done.returncode == 0, done.stderr
    return done


@functools.cache
def _server():
    """The connection to the process that forks, which ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", __name__, str(theirs.fileno())]
    subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    return ours


def _serve(connection):
    """Import everything, then fork as asked. Returns in each child, with its code."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert os.listdir("/proc/self/task") == [str(os.getpid())]  # no other thread: a fork would lack it
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the children
    while True:
        message, files, _, _ = socket.recv_fds(connection, MOST_BYTES, 4)
        if not message:
            sys.exit()
        if not os.fork() and _is_child(files[3]):
            connection.close()
            return _become(json.loads(message), files)
        for file in files:
            os.close(file)


def _is_child(channel):
    """Fork once more. In the parent, which tells the child's number and its status, this does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (pid := os.fork()):
        return True
    with socket.socket(fileno=channel) as channel:
        channel.send(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        try:
            channel.send(f"{status}\n".encode())
        finally:
            os._exit(0)


def _become(request, files):
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[0] = ""  # as `python -c` has it
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return request["code"]


if __name__ == "__main__":
    exec(compile(_serve(socket.socket(fileno=int(sys.argv[1]))), "<string>", "exec"), {"__name__": "__main__"})
