"""Limits of a server: of its queue, of bodies, of headers."""

import contextlib
import http.client
import json
import socket
import threading
import time

import httpx
import pytest

from linalign import EngineBusy, Prompt, SamplingParams
from linalign.server.threads import LONG
from tests.engines import make_engine, run_all

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Tell me about towns."}]
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def prompt(num_tokens=10, shift=0):
    return Prompt((tuple(range(5 + shift, 5 + shift + num_tokens)),))


# The engine's queue


def test_the_queue_is_bounded_by_choices(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100, max_num_seqs=2, max_queued_requests=3)
    for i in range(3):
        engine.submit(prompt(shift=i), PARAMS, lambda _: None)
    for more in (1, 2):
        with pytest.raises(EngineBusy) as error:
            engine.submit(prompt(), PARAMS, lambda _: None, n=more)
    assert error.value.retry_after == 2
    engine.step()  # two run, one waits
    engine.submit(prompt(), PARAMS, lambda _: None, n=2)
    with pytest.raises(EngineBusy):
        engine.refuse_early()
    while engine.step():
        pass
    engine.refuse_early()
    assert engine.backlog.num_requests == engine.backlog.num_tokens == 0


def test_the_queue_is_bounded_by_tokens_of_all_branches(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, num_pages=100, max_queued_tokens=50)
    aligned = Prompt((tuple(range(5, 25)),), (1.0,), (2.0,), tuple(range(5, 20)))  # 35 tokens
    engine.submit(aligned, PARAMS, lambda _: None)
    with pytest.raises(EngineBusy):
        engine.submit(prompt(16), PARAMS, lambda _: None)
    engine.submit(prompt(15), PARAMS, lambda _: None)
    while engine.step():
        pass
    engine.submit(prompt(200), PARAMS, lambda _: None)  # an empty queue accepts any length
    with pytest.raises(EngineBusy):
        engine.submit(prompt(1), PARAMS, lambda _: None)


def test_aborts_and_preemptions_keep_the_token_count_correct(tiny):
    loaded, _ = tiny
    engine = make_engine(loaded, page_size=3, num_pages=24, max_queued_requests=4)
    ids = [engine.submit(prompt(10, i), PARAMS, lambda _: None) for i in range(4)]
    engine.abort(ids[3])
    engine.abort(ids[3])
    long = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    run_all(engine, [])
    run_all(engine, [(prompt(10, i), long) for i in range(4)])
    assert engine.scheduler.num_preemptions > 0
    assert engine.backlog.num_requests == engine.backlog.num_tokens == 0


# Over HTTP


@pytest.fixture(scope="module")
def small(serving_small):
    with serving_small("--max-num-seqs", "2", "--max-queued-requests", "3", "--max-body-bytes", "20000") as (url, _):
        yield url


def body(**fields):
    return {"model": "smollm2", "messages": MESSAGES, "max_tokens": 40, "temperature": 0, "ignore_eos": True, **fields}


def metric(url, name):
    lines = httpx.get(url + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"linalign:{name}"))


def test_requests_beyond_the_queue_are_refused_at_once(small):
    replies = [None] * 12

    def ask(index):
        began = time.monotonic()
        response = httpx.post(f"{small}/v1/chat/completions", json=body(max_tokens=150), timeout=120)
        replies[index] = (response, time.monotonic() - began)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served = [response for response, _ in replies if response.status_code == 200]
    refused = [(response, seconds) for response, seconds in replies if response.status_code == 429]
    assert len(served) + len(refused) == 12
    assert len(served) >= 3  # the queue holds 3
    assert refused
    slowest = max(seconds for response, seconds in replies if response.status_code == 200)
    for response, seconds in refused:
        assert response.json()["error"]["code"] == "queue_full"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert seconds < slowest  # refused at once
    texts = {response.json()["choices"][0]["message"]["content"] for response in served}
    assert len(texts) == 1
    assert metric(small, "num_requests_waiting") == 0


def test_short_bodies_do_not_wait_behind_long_ones(own_server, monkeypatch):
    """With any number of long bodies, and with any time for each: here they take until `release` is set."""
    url, engine = own_server
    original, builds, release, statuses = engine.prompts.build, [], threading.Event(), []

    def build(messages, *more):
        if len(messages[0]["content"]) > LONG:
            builds.append(threading.current_thread())
            assert release.wait(60)
        return original(messages, *more)

    def ask(content):
        request_body = body(messages=[{"role": "user", "content": content}], max_tokens=1)
        return httpx.post(f"{url}/v1/chat/completions", json=request_body, timeout=120).status_code

    monkeypatch.setattr(engine.prompts, "build", build)
    threads = [threading.Thread(target=lambda: statuses.append(ask("na " * LONG))) for _ in range(40)]
    for thread in threads:
        thread.start()
    try:
        while not builds:
            assert not statuses
            time.sleep(0.01)
        assert [ask(f"{number} towns") for number in range(5)] == [200] * 5
        assert len(builds) == 1
    finally:
        release.set()
        for thread in threads:
            thread.join()
    assert statuses == [400] * 40  # longer than the context
    assert len(builds) == 40
    assert len(set(builds)) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_every_endpoint_refuses(small, path):
    """While five long replies fill the server, no endpoint accepts another."""
    client = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None))
    streams = []
    try:
        for number in range(5):
            fill = client.build_request("POST", f"{small}/v1/chat/completions", json=body(max_tokens=3000, stream=True))
            streams.append(client.send(fill, stream=True))
            while metric(small, "num_requests_running") < min(number + 1, 2):
                time.sleep(0.05)
        fields = {"/v1/completions": {"prompt": "Towns"}, "/v1/responses": {"input": "Towns"}}.get(
            path, {"messages": MESSAGES}
        )
        response = httpx.post(small + path, json={"model": "smollm2", **fields}, timeout=30)
        assert response.status_code == 429
        assert response.headers["Retry-After"]
    finally:
        for stream in streams:
            stream.close()
    while metric(small, "num_requests_running") + metric(small, "num_requests_waiting"):
        time.sleep(0.05)


def test_a_body_that_is_too_long_is_refused_by_its_length_alone(small):
    """The body is not read: the response arrives before the body is sent."""
    host = small.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "body_too_large"


def test_a_body_without_a_length_is_counted_while_it_is_read(small):
    def chunks():
        yield b'{"model": "smollm2", "messages": [{"role": "user", "content": "'
        for _ in range(100):
            yield b"x" * 1000

    response = httpx.post(
        f"{small}/v1/chat/completions", content=chunks(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413
    assert "20000 bytes" in response.json()["error"]["message"]


def test_a_body_within_the_limit_is_served(small):
    fits = body(max_tokens=1, stop=["x" * 18_000])
    assert httpx.post(f"{small}/v1/chat/completions", json=fits, timeout=60).status_code == 200
    too_long = body(max_tokens=1, stop=["x" * 20_000])
    assert httpx.post(f"{small}/v1/chat/completions", json=too_long, timeout=60).status_code == 413


def answer_to(url, data):
    """The response to bytes on their own connection; b"" if the server closed it without a response."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):  # the server may close before everything is sent
            connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
        return answer


@pytest.mark.parametrize(
    "start", [b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ", b"GET /health?"], ids=["header", "url"]
)
def test_headers_of_4_megabytes_are_refused(small, start):
    answer = answer_to(small, start + b"y" * (4 << 20) + b" HTTP/1.1\r\n\r\n")
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
    slowly = answer_to(small, start + b"y" * (65 << 10))  # without the end of the headers
    assert slowly.startswith(b"HTTP/1.1 431 ")
    assert json.loads(slowly.split(b"\r\n\r\n")[1])["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize("trailer", [b"a", b"X: y\r\n"], ids=["one without end", "many"])
def test_trailers_are_bounded(small, trailer):
    """Also after the request has been answered: the connection is closed, and other clients are not delayed."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request_bytes = head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + (b"X: " if trailer == b"a" else b"")
    host, port = small.removeprefix("http://").split(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=20) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(request_bytes)
        while sent < 64 << 20:
            connection.sendall(trailer * 10_000)
            sent += len(trailer) * 10_000
    assert sent < 16 << 20  # buffers of the kernel
    assert httpx.get(small + "/health").status_code == 200


@pytest.mark.parametrize("length", [b"0" * 5000 + b"2", b"9" * 5000, b"1" + b"0" * 30])
def test_content_lengths_with_many_digits_are_parsed(small, length):
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = answer_to(small, head + b"Content-Length: " + length + b"\r\n\r\n{}")
    assert answer.startswith(b"HTTP/1.1 4")  # 413, or 400 for the missing model or the invalid number
    assert b"Traceback" not in answer


def test_headers_within_the_limit_are_read_and_connections_kept(small):
    with httpx.Client(base_url=small) as client:
        for _ in range(3):  # together more than the limit, with bodies in between
            assert client.get("/health", headers={"X-Long": "y" * 30_000}).status_code == 200
            fits = body(max_tokens=1, stop=["x" * 18_000])
            assert client.post("/v1/chat/completions", json=fits, timeout=60).status_code == 200
