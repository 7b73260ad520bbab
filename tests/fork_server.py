"""Processes without import time: forks of a process that has imported everything and run nothing.

Each fork is a real process with its own arguments, environment, files, signals and exit status. A fork can't test a
cold start: such tests start a new interpreter.
"""

import contextlib
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

from tests.counts import LONG_RUN

PRELOADED = (
    "jsonschema", "linalign.alignment_core.engine", "linalign.alignment_core.loading.loader",
    "linalign.evaluation.command", "linalign.server.app", "linalign.server.commands.bench",
    "linalign.server.commands.main", "linalign.server.commands.serve", "linalign.server.commands.terminal_chat",
    "linalign.server.http_protocol", "linalign.server.shutdown", "linalign.server.tracing", "llguidance.hf", "openai",
    "transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama", "uvicorn", "uvloop",
)  # fmt: skip
MOST_BYTES = 1 << 20  # largest size of a request
ADDRESS = "FORK_SERVER"  # environment variable with the server's socket address


@functools.cache
def start():
    """Start the fork server, unless a parent process has already started one. Returns its address, and its process if
    this call started it (else None). The server ends when the process that started it ends.
    """
    if address := os.environ.get(ADDRESS):
        return address, None
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        address = os.environ[ADDRESS] = "@" + folder  # a unique name
        listener.bind(address.replace("@", "\0"))  # an abstract socket leaves no file behind
        listener.listen()
        command = [sys.executable, "-m", __name__, str(listener.fileno())]
        return address, subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=subprocess.PIPE)


class Process:
    """Runs Python code in its own process. Leaving the `with` block waits until the process has ended.

    argv: sys.argv. env: The whole environment; None copies this process's. cwd: None for this process's.
    stdin, stdout, stderr: A file, subprocess.DEVNULL, or None to inherit; stdin may also be subprocess.PIPE.
    pid, poll, wait, send_signal, kill, returncode: As in subprocess.Popen.
    """

    def __init__(self, code, argv, *, env=None, cwd=None, stdin=None, stdout=None, stderr=None):
        self.args, self.returncode, self.stdin = argv, None, None
        request = {"code": code, "argv": argv, "env": dict(env or os.environ), "cwd": str(cwd or os.getcwd())}
        with contextlib.ExitStack() as stack:
            nothing = stack.enter_context(open(os.devnull, "r+b"))
            if stdin == subprocess.PIPE:
                read_end, write_end = os.pipe()
                stdin, self.stdin = stack.enter_context(open(read_end, "rb")), open(write_end, "wb")  # noqa: SIM115
            files = [
                nothing if file == subprocess.DEVNULL else file or standard
                for file, standard in ((stdin, 0), (stdout, 1), (stderr, 2))
            ]
            numbers = [file if isinstance(file, int) else file.fileno() for file in files]
            self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._channel.connect(start()[0].replace("@", "\0"))  # here, because the server waits for the request
            socket.send_fds(self._channel, [json.dumps(request).encode()], numbers)
            self.pid = int(self._channel.recv(16))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.stdin:
            self.stdin.close()
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
            self.returncode = os.waitstatus_to_exitcode(int(self._channel.recv(16)))
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(code, *argv, env=None, cwd=None, timeout=600, check=False, cold=LONG_RUN):
    """Like subprocess.run of `python -c CODE ARGV…` with captured text output. cold: Use a new interpreter, no fork."""
    done = _run_cold(code, argv, env, cwd, timeout) if cold else _run_forked(code, argv, env, cwd, timeout)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def _run_cold(code, argv, env, cwd, timeout):
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True)


def _run_forked(code, argv, env, cwd, timeout):
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with Process(code, ["-c", *argv], env=env, cwd=cwd, stdout=stdout, stderr=stderr) as process:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        stdout.seek(0), stderr.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout.read(), stderr.read())


def popen(command, **options):
    """Replaces subprocess.Popen for `python … -c CODE ARGV…` commands, in processes that start others."""
    code, *args = command[command.index("-c") + 1 :]
    return Process(code, ["-c", *args], **options)


def _serve(listener):
    """Import everything, then fork once per request until stdin ends. Returns only in each child, with its code."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert os.listdir("/proc/self/task") == [str(os.getpid())]  # a fork copies no other thread
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the intermediate processes
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        channel, _ = listener.accept()
        message, files, _, _ = socket.recv_fds(channel, MOST_BYTES, 3)
        if not os.fork() and _is_child(channel, files):
            listener.close()
            channel.close()
            return _become(json.loads(message), files)
        channel.close()
        for file in files:
            os.close(file)
    sys.exit()


def _is_child(channel, files):
    """Fork again. Returns True in the child. The parent sends the child's pid and exit status, and does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not (pid := os.fork()):
        return True
    for file in files:
        os.close(file)
    try:
        channel.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        channel.send(str(status).encode())
    finally:
        os._exit(0)


def _become(request, files):
    import torch  # not at module level: xdist's controller imports this module and does not need torch

    for number, file in enumerate(files):
        os.dup2(file, number)
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
    code = _serve(socket.socket(fileno=int(sys.argv[1])))
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
