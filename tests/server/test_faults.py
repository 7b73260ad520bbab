"""Faults inside a real server process: which clients get which error, and that others are not affected."""

import json
import signal
import subprocess
import threading
import time
import types

import httpx
import pytest
import uvicorn

from linalign.server.shutdown import EVENT_LOOP_FACTOR, Server
from tests.serving import await_metric

pytestmark = pytest.mark.slow

# The engine fails in a chosen way as soon as the file `trigger` exists.
BREAK_A_STEP = """
import ctypes, os, time
from linalign.alignment_core.execution.model_runner import ModelRunner
forward = ModelRunner.forward
def broken(self, step):
    if os.path.exists({trigger!r}):
        {what}
    return forward(self, step)
ModelRunner.forward = broken
"""
# The request with this seed fails in a chosen place.
BREAK_A_REQUEST = """
from linalign.alignment_core.decoding import policy
from linalign.alignment_core.loop import Loop
original_edit, original_accept = policy.edit, Loop._accept
def broken_edit(y, next_tokens):
    if any(sequence.params.seed == 13 and position >= 3 for sequence, position in next_tokens):
        raise ValueError("injected into the draw")
    return original_edit(y, next_tokens)
def broken_accept(self, sequence, *args):
    if sequence.params.seed == 14 and len(sequence.output_ids) == 3:
        raise ValueError("injected behind the draw")
    return original_accept(self, sequence, *args)
policy.edit, Loop._accept = broken_edit, broken_accept
"""


# A step is taken for dead after three seconds instead of ten.
STEP_TIMEOUT = 3.0
IMPATIENT = f"""
from linalign.server import shutdown
shutdown.STEP_TIMEOUT = {STEP_TIMEOUT}
"""


def chat(url, **fields):
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about towns."}], "temperature": 0}
    body |= {"max_tokens": 24, "principle": "Mention the sea.", "ignore_eos": True, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def events(url, **fields):
    """The events of a stream, parsed, without [DONE]."""
    response = chat(url, stream=True, **fields)
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def at_once(*calls):
    """Run calls in threads; returns their results in order."""
    results = [None] * len(calls)

    def run(index, call):
        results[index] = call()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("seed", [13, 14], ids=["in the draw", "behind the draw"])
def test_an_exception_inside_one_sequence_ends_that_request_alone(serving_small, seed):
    with serving_small(patch=BREAK_A_REQUEST) as (url, _):
        alone = chat(url).json()["choices"][0]["message"]["content"]
        good, bad, streamed = at_once(lambda: chat(url), lambda: chat(url, seed=seed), lambda: events(url, seed=seed))
        assert good.json()["choices"][0]["message"]["content"] == alone
        assert bad.status_code == 500
        assert bad.json()["error"]["code"] == "internal_error"
        assert "injected" not in bad.text
        assert streamed[-1]["error"]["code"] == "internal_error"
        assert any(choice["delta"].get("content") for event in streamed[:-1] for choice in event["choices"])
        metrics = httpx.get(url + "/metrics").text
        assert "linalign:num_requests_running 0.0" in metrics
        assert "linalign:kv_cache_usage_perc 0.0" in metrics
        assert httpx.get(url + "/health").status_code == 200
        assert chat(url).json()["choices"][0]["message"]["content"] == alone


@pytest.mark.parametrize(
    ("code", "last_words"),
    [
        ("raise ValueError('injected')", "the engine failed: ValueError('injected')"),
        ("time.sleep(10**6)", "in broken"),
        ("ctypes.PyDLL(None).sleep(10**6)", "in broken"),
    ],
    ids=["raises", "hangs", "hangs with the interpreter's lock"],
)
def test_a_step_that_fails_or_hangs_ends_the_process_with_an_error_for_everyone(
    serving_small, tmp_path, code, last_words
):
    trigger, stderr = tmp_path / "trigger", (tmp_path / "stderr").open("w+")
    holds_lock = "PyDLL" in code
    patch = IMPATIENT + BREAK_A_STEP.format(trigger=str(trigger), what=code)
    with serving_small(patch=patch, status=1, stderr=stderr) as (url, process):
        chat(url)

        def outcome(**fields):
            try:
                return events(url, **fields) if fields.get("stream") else chat(url, **fields)
            except httpx.TransportError as error:
                return error

        running = threading.Timer(2, trigger.touch)  # by then the watchdog has measured a step
        running.start()
        began = time.monotonic()
        replies = at_once(*[lambda n=n: outcome(max_tokens=3000 + n) for n in range(3)])
        assert process.wait(60) == 1
        assert time.monotonic() - began < STEP_TIMEOUT * (EVENT_LOOP_FACTOR if holds_lock else 1) + 15
        if holds_lock:  # the process can't send an error
            assert all(isinstance(reply, httpx.TransportError) for reply in replies)
        else:
            assert [reply.status_code for reply in replies] == [503] * 3
            assert all(reply.json()["error"]["code"] == "engine_dead" for reply in replies)
    stderr.seek(0)
    log = stderr.read()
    assert last_words in log
    assert "Traceback" in log or "most recent call first" in log


def test_health_is_503_as_soon_as_a_hang_is_detected(serving_small, tmp_path):
    trigger = tmp_path / "trigger"
    patch = BREAK_A_STEP.format(trigger=str(trigger), what="time.sleep(10**6)")
    patch += IMPATIENT + "shutdown.ERROR_DELIVERY_TIME = 5"
    with serving_small(patch=patch, status=1, stderr=subprocess.DEVNULL) as (url, process):
        chat(url)
        trigger.touch()
        assert chat(url).status_code == 503
        health = httpx.get(url + "/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "engine_dead")
        assert chat(url).status_code == 503
        assert process.wait(30) == 1


def test_a_first_step_may_take_longer_than_the_step_timeout(serving_small):
    """The first step may compile. Before it, the engine's loop has already run idle turns."""
    patch = (
        BREAK_A_STEP.format(trigger="/", what=f"time.sleep(0 if self.num_forwards else {STEP_TIMEOUT + 1})") + IMPATIENT
    )
    with serving_small(patch=patch) as (url, _):
        assert chat(url, max_tokens=4).status_code == 200
        assert chat(url, max_tokens=4).status_code == 200


def test_a_process_that_was_stopped_during_a_step_continues(serving_small):
    """By SIGSTOP, docker pause or a closed laptop: more time than the timeout passes, but the loop had no turns."""
    with serving_small(patch=IMPATIENT) as (url, process):
        replies = []
        asking = threading.Thread(target=lambda: replies.append(chat(url, max_tokens=600)))
        asking.start()
        await_metric(url, "num_requests_running 1.0")
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * STEP_TIMEOUT)
        process.send_signal(signal.SIGCONT)
        asking.join()
        assert replies[0].json()["usage"]["completion_tokens"] == 600
        assert process.poll() is None


@pytest.mark.parametrize(("longest", "patience"), [(0.0, 300), (0.02, 10), (3.0, 30)])
def test_slow_machines_do_not_count_as_hung(longest, patience):
    """A machine that has not finished its first step counts as slow too: a large model on a CPU may need a minute."""
    engine = types.SimpleNamespace(pace=(None, longest))
    assert Server(uvicorn.Config(None), engine, 1.0)._step_timeout == patience
