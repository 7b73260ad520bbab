"""Tests of the tests: each fault is planted in a copy of the project, and the tests of a short run must fail."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Fault:
    """right: Text that occurs once in the file. wrong: The faulty text. tests: The tests that must fail."""

    file: str
    right: str
    wrong: str
    tests: str


FAULTS = {
    "scheduler: a preempted sequence goes behind all that wait": Fault(
        "alignment_core/scheduling/scheduler.py",
        "self.waiting.appendleft(sequence)",
        "self.waiting.append(sequence)",
        "tests/alignment_core/test_scheduler.py",
    ),
    "cache: a page that was never computed keeps its published name": Fault(
        "alignment_core/scheduling/kv_cache.py",
        "if not written:",
        "if not written and index > branch.num_published:",
        "tests/alignment_core/test_kv_cache.py",
    ),
    "sampling: choices of a request draw the same numbers": Fault(
        "alignment_core/decoding/draw_settings.py",
        "(s.seed, s.choice, position)",
        "(s.seed, 0, position)",
        "tests/alignment_core/test_sampling.py",
    ),
    "prompts: a user's text may hold a reply's control tokens": Fault(
        "alignment_core/text/safe_rendering.py",
        'patterns = {"assistant": forbidden.in_replies}',
        'patterns = dict.fromkeys(("assistant", "user"), forbidden.in_replies)',
        "tests/alignment_core/test_prompts.py",
    ),
    "streaming: what is held for a call that is cut off is lost": Fault(
        "server/replies/chat_completion.py",
        "parser.feed(output.text) + (parser.finish() if output.finish_reason else [])",
        "parser.feed(output.text)",
        "tests/server/test_chat.py",
    ),
    "limits: a reply may be a token longer than the context": Fault(
        "alignment_core/scheduling/limits.py",
        "left = self.max_model_len - longest",
        "left = self.max_model_len - longest + 1",
        "tests/alignment_core/test_limits.py",
    ),
    "auth: a path is open that has an open one in it": Fault(
        "server/middleware/auth.py",
        "path.startswith(OPEN_BELOW)",
        "OPEN_BELOW in path",
        "tests/server/test_auth.py",
    ),
    "shutdown: a server that ends takes in new requests": Fault(
        "server/shutdown.py",
        "self._engine.drain()\n",
        "\n",
        "tests/server/test_shutdown.py",
    ),
    "tool calls: one more than may be called": Fault(
        "server/tool_calls.py",
        'c["index"] < self._max_calls',
        'c["index"] <= self._max_calls',
        "tests/server/test_tool_calls.py",
    ),
    "playground: a new ratio asks with what the form says now": Fault(
        "server/playground/compare.js",
        "{ ...this.#asked, ratio: this.#app.settings.ratio }",
        "{ ...this.#app.settings }",
        "tests/server/playground/test_compare.py",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_replaces_a_unique_line(fault):
    """Otherwise the long run could not plant the fault."""
    assert (ROOT / fault.file).read_text().count(fault.right) == 1


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_noticed(fault, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*"))
    (copy / ".venv").symlink_to(ROOT / ".venv")
    environment = {name: value for name, value in os.environ.items() if name not in ("FORK_SERVER", "LONG_RUN")}
    environment |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not long", fault.tests]
    assert not run(command, copy, environment).returncode, "the tests fail without the fault"
    file = copy / fault.file
    file.write_text(file.read_text().replace(fault.right, fault.wrong))
    result = run(command, copy, environment)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert "FAILED tests" in result.stdout
    print(*(line for line in result.stdout.splitlines() if line.startswith("FAILED")))


def run(command, folder, environment):
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
