"""How a server stops: gracefully at the first signal, at once at the second."""

import json
import signal
import subprocess
import threading
import time

import httpx
import pytest

from tests import fork_server
from tests.server.test_faults import BREAK_A_STEP, chat, events
from tests.serving import await_metric, serving

pytestmark = pytest.mark.slow

BASE = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about towns."}], "max_tokens": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_exceeds_the_shutdown_timeout_ends_with_abort(serving_small, stream):
    body = {**BASE, "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    with serving_small("--shutdown-timeout", "1") as (url, process):
        asking = httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=60)
        timer = threading.Timer(1, process.send_signal, [signal.SIGTERM])
        timer.start()
        with asking as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert process.wait(30) == 0
    if stream:
        assert lines[-1] == "[DONE]"
    reply = json.loads(lines[-2] if stream else lines[-1])
    assert reply["choices"][0]["finish_reason"] == "abort"


def test_a_stream_finishes_on_sigterm(serving_small):
    """A reply that fits in the shutdown timeout is complete."""
    body = {**BASE, "max_tokens": 150, "stream": True, "ignore_eos": True}
    with serving_small() as (url, process):
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert process.wait(30) == 0
    assert rest[-1] == "data: [DONE]"
    assert len(rest) > 20


def test_a_keyboard_interrupt_prints_no_traceback(tmp_path):
    with (tmp_path / "stderr").open("w") as stderr, serving(status=130, stderr=stderr) as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert "Traceback" not in (tmp_path / "stderr").read_text()


IN_A_DESTRUCTOR = """
import os, signal, time
from linalign.server.commands import serve
serve.EXIT_TIMEOUT = 0.5
signal.signal(signal.SIGTERM, serve.stop_loading)
class Told:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
Told()
print("it went on", flush=True)
time.sleep(60)
"""


def test_a_stop_during_loading_is_not_lost_in_a_destructor():
    done = fork_server.run(IN_A_DESTRUCTOR, timeout=30)
    assert done.returncode == 0
    assert "Exception ignored" in done.stderr
    assert done.stdout == "it went on\n"


def test_a_second_sigterm_stops_at_once(serving_small):
    with serving_small("--shutdown-timeout", "600") as (url, process):
        ends = []

        def ask():
            try:
                ends.append(chat(url, max_tokens=7000).status_code)
            except httpx.TransportError:
                ends.append(None)

        thread = threading.Thread(target=ask)
        thread.start()
        await_metric(url, "num_requests_running 1.0")
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        thread.join()
        assert ends in ([None], [500])  # cut off, never a status that looks like success


def test_during_the_shutdown_new_requests_get_503(serving_small, tmp_path):
    with (tmp_path / "stderr").open("w") as stderr, serving_small(stderr=stderr) as (url, process):
        alone = events(url, max_tokens=400)
        kept_alive = httpx.Client(base_url=url)
        assert kept_alive.get("/health").status_code == 200
        streamed = []
        running = threading.Thread(target=lambda: streamed.extend(events(url, max_tokens=400)))
        running.start()
        await_metric(url, "num_requests_running 1.0")
        process.send_signal(signal.SIGTERM)
        while kept_alive.get("/health").status_code != 503:
            assert running.is_alive()
        for client in (kept_alive, httpx.Client(base_url=url)):  # on the open connection and on a new one
            for path, body in (("/v1/chat/completions", BASE), ("/v1/responses", {"model": "smollm2", "input": "x"})):
                refused = client.post(path, json=body)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "engine_dead"
                assert "stopping" in refused.json()["error"]["message"]
        assert running.is_alive()
        running.join()
        assert process.wait(20) == 0
    texts = [[c["delta"].get("content") for e in stream for c in e["choices"]] for stream in (streamed, alone)]
    assert texts[0] == texts[1]
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_waiting_requests_are_ended_like_running_ones(serving_small):
    with serving_small("--max-num-seqs", "1", "--shutdown-timeout", "1") as (url, process):
        replies = []
        threads = [threading.Thread(target=lambda: replies.append(chat(url, max_tokens=4000))) for _ in range(3)]
        for thread in threads:
            thread.start()
        await_metric(url, "num_requests_waiting 2.0")
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(20) == 0
    assert [reply.status_code for reply in replies] == [200] * 3
    assert [reply.json()["choices"][0]["finish_reason"] for reply in replies] == ["abort"] * 3
    assert sorted(reply.json()["usage"]["completion_tokens"] > 0 for reply in replies) == [False, False, True]


def test_an_engine_that_hangs_during_the_shutdown_does_not_block_it(serving_small, tmp_path):
    """The watchdog of steps has ended by then, so a last deadline ends the process."""
    trigger = tmp_path / "trigger"
    patch = BREAK_A_STEP.format(trigger=str(trigger), what="time.sleep(10**6)")
    patch += "\nfrom linalign.server import shutdown; shutdown.CLOSE_TIMEOUT = 1; shutdown.STEP_TIMEOUT = 1.0"
    with serving_small("--shutdown-timeout", "1", patch=patch, status=1, stderr=subprocess.DEVNULL) as (url, process):
        chat(url)
        asking = threading.Thread(target=outcome_of, args=[lambda: chat(url, max_tokens=4000)])
        asking.start()
        await_metric(url, "num_requests_running 1.0")
        process.send_signal(signal.SIGTERM)
        trigger.touch()
        assert process.wait(30) == 1
        asking.join()


def test_an_engine_failure_during_the_shutdown_sets_the_exit_status(serving_small, tmp_path):
    trigger = tmp_path / "trigger"
    patch = BREAK_A_STEP.format(trigger=str(trigger), what="raise ValueError('injected')")
    with serving_small(patch=patch, status=1, stderr=subprocess.DEVNULL) as (url, process):
        replies = []
        asking = threading.Thread(target=lambda: replies.append(chat(url, max_tokens=4000)))
        asking.start()
        await_metric(url, "num_requests_running 1.0")
        process.send_signal(signal.SIGTERM)
        while httpx.get(url + "/health").status_code == 200:
            time.sleep(0.02)
        trigger.touch()
        assert process.wait(30) == 1
        asking.join()
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in replies] == [(503, "engine_dead")]


def outcome_of(call):
    try:
        return call()
    except httpx.TransportError as error:
        return error
