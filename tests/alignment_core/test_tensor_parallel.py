"""A model in two parts, two processes on gloo: the same replies as in one; failures end in errors, never in waiting."""

import json
import os
import subprocess
import sys
import time

import pytest

from alignment_core import LoadingError, load
from tests.alignment_core.test_engine import prompts
from tests.conftest import tiny_pair
from tests.oracle import Setting

SCRIPT = """
import json, os, signal, sys
from tests.alignment_core.test_engine import GREEDY, prompts
from tests.conftest import make_engine, run_all, token_ids
from alignment_core import load

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


def run(checkpoint, *arguments):
    """What the script printed, line by line; it must end well unless it vanishes."""
    command = [sys.executable, "-c", SCRIPT, checkpoint, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
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
    assert seen["width"] == 1  # of two key heads
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


def test_what_can_not_be_split_is_refused():
    code = "from alignment_core import load; load(None, tensor_parallel_size=2)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert result.returncode == 1
    assert "LoadingError: smollm2 has 3 key heads, which 2 processes can't share evenly" in result.stderr
    with pytest.raises(LoadingError, match="GGUF"):
        load("model.gguf", tensor_parallel_size=2)
    with pytest.raises(LoadingError, match="a GPU each"):
        load("model", device="cuda:1", tensor_parallel_size=2)
