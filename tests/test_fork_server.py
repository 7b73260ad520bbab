"""Forks are real processes: their own arguments, environment, files, signals and exit status."""

import os
import signal
import subprocess

import pytest

from tests import fork_server


def test_arguments_environment_folder_and_output(tmp_path):
    code = """
import os, sys
print(sys.argv, os.environ["ONE"], "HOME" in os.environ, os.getcwd())
print(2, file=sys.stderr)
"""
    environment = {"ONE": "1", "OMP_NUM_THREADS": "1"}
    done = fork_server.run(code, "a", "b c", cold=False, env=environment, cwd=tmp_path)
    assert done.stdout == f"['-c', 'a', 'b c'] 1 False {tmp_path}\n"
    assert done.returncode == 0
    assert done.stderr.startswith("2\n")  # Triton may print more at the end


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('bad')", 1, "bad\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, ""),
        ("import atexit; atexit.register(print, 'the end')", 0, ""),
    ],
)
def test_exit_status(code, status, words):
    done = fork_server.run(code, cold=False)
    assert done.returncode == status
    assert words in done.stderr
    assert done.stdout == ("the end\n" if "atexit" in code else "")


def test_signals_and_timeouts():
    with fork_server.Process("import time; time.sleep(60)", []) as process:
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == process.poll() == -signal.SIGTERM
        process.kill()  # on an ended process: no effect


def test_standard_input():
    process = fork_server.Process("import sys; sys.exit(len(sys.stdin.read()))", [], stdin=subprocess.PIPE)
    with process:
        process.stdin.write(b"seven..")
        process.stdin.close()
    assert process.returncode == 7


def test_a_child_process_has_slow_imports_and_can_start_children():
    code = """
import os, sys
assert {"torch", "transformers", "linalign.server.app"} <= set(sys.modules)
assert os.listdir("/proc/self/task") == [str(os.getpid())]
from tests import fork_server
print(fork_server.run("print(6 * 7)", cold=False).stdout, end="")
"""
    assert fork_server.run(code, check=True, cold=False).stdout == "42\n"


def test_children_share_no_state():
    fork_server.run("import torch; torch.one = 1", check=True, cold=False)
    assert fork_server.run("import torch; print(hasattr(torch, 'one'))", check=True, cold=False).stdout == "False\n"
