"""Clients that read slowly, do not read, or stop sending: they are disconnected and do not delay others."""

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest

pytestmark = pytest.mark.slow

SHORT = 3.0  # IDLE_TIMEOUT here, in seconds, instead of a minute
# Small kernel buffers, so that the server notices unread data long before megabytes are sent.
IMPATIENT = f"""
import socket
import linalign.server.http_protocol as http_protocol
http_protocol.IDLE_TIMEOUT = {SHORT}
connection_made = http_protocol.BoundedProtocol.connection_made
def made(self, transport):
    connection_made(self, transport)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
http_protocol.BoundedProtocol.connection_made = made
"""
BODY = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about towns."}], "ignore_eos": True}
# About 3 kB per token.
WORDY = {"stream": True, "max_tokens": 2000, "logprobs": True, "top_logprobs": 20}


@pytest.fixture(scope="module")
def impatient(serving_small):
    with serving_small(patch=IMPATIENT) as (url, _):
        yield url


def connect(url):
    """A connection with a tiny receive buffer."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


def request(body):
    """The bytes of a chat request."""
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def metric(url, name):
    lines = httpx.get(url + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_cut_off(connection):
    """Read until the server closes the connection. Returns True then; recv raises a timeout otherwise."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return True


def ended_by_abort(url):
    return metric(url, 'linalign:request_success_total{finished_reason="abort"}')


def test_a_client_that_does_not_read_is_cut_off_and_its_sequence_ends(impatient):
    before, fields = ended_by_abort(impatient), {"max_tokens": 60, "temperature": 0, "principle": "Be brief."}
    alone = httpx.post(impatient + "/v1/chat/completions", json=BODY | fields, timeout=60).json()
    connection = connect(impatient)
    connection.sendall(request(BODY | WORDY))
    wait_until(lambda: metric(impatient, "linalign:num_requests_running") == 1)
    beside = httpx.post(impatient + "/v1/chat/completions", json=BODY | fields, timeout=60).json()
    assert beside["choices"] == alone["choices"]
    wait_until(lambda: ended_by_abort(impatient) == before + 1)  # long before its 2,000 tokens are drawn
    wait_until(lambda: metric(impatient, "linalign:kv_cache_usage_perc") == 0)
    assert is_cut_off(connection)


def test_a_client_that_reads_a_byte_now_and_then_is_cut_off_too(impatient):
    before = ended_by_abort(impatient)
    connection, has_ended = connect(impatient), threading.Event()
    connection.sendall(request(BODY | WORDY))

    def dribble():
        with contextlib.suppress(ConnectionError):
            while connection.recv(1):
                if has_ended.wait(0.2):
                    break

    reader = threading.Thread(target=dribble)
    reader.start()
    wait_until(lambda: ended_by_abort(impatient) == before + 1)
    has_ended.set()
    reader.join()
    assert is_cut_off(connection)


def test_a_client_that_reads_with_pauses_gets_everything(impatient):
    connection = connect(impatient)
    connection.sendall(request(BODY | WORDY | {"max_tokens": 120}))
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        received += connection.recv(16384)
        time.sleep(0.02)
    assert received.count(b'"finish_reason":"length"') == 1
    assert received.count(b'"top_logprobs"') == 120


def test_an_unread_reply_leaves_no_connection(impatient):
    before = metric(impatient, "process_open_fds")
    connections = [connect(impatient) for _ in range(4)]
    for connection in connections:
        connection.sendall(request(BODY | {"max_tokens": 100, "logprobs": True, "top_logprobs": 20}))
    wait_until(lambda: metric(impatient, "process_open_fds") >= before + 4)
    wait_until(lambda: metric(impatient, "process_open_fds") <= before)
    assert all(is_cut_off(connection) for connection in connections)


def test_idle_clients_are_disconnected(impatient):
    line = b"POST /v1/chat/completions HTTP/1.1\r\n"
    headers = line + b"Host: localhost\r\nContent-Length: 100\r\n\r\n"
    connections = [connect(impatient) for _ in range(4)]
    for connection, first_bytes in zip(connections, (b"", line[:-10], headers[:-20], headers + b"{"), strict=True):
        connection.sendall(first_bytes)
    assert all(is_cut_off(connection) for connection in connections)


def test_a_request_that_waits_behind_a_long_reply_is_not_an_idle_client(impatient):
    """The server itself pauses reading while the first reply takes longer than the idle timeout."""
    connection = connect(impatient)
    connection.sendall(request(BODY | {"stream": True, "max_tokens": 600}))
    more = request(BODY | {"max_tokens": 1, "stop": ["x" * 100_000]})  # more than the server buffers meanwhile
    sender = threading.Thread(target=connection.sendall, args=[more])
    sender.start()
    began, received = time.monotonic(), b""
    while received.count(b"HTTP/1.1 200 OK") < 2:
        part = connection.recv(65536)
        assert part, "cut off"
        received += part
    assert time.monotonic() - began > SHORT
    sender.join()


def test_a_pause_between_tokens_is_not_an_idle_client(impatient):
    """A client that has sent its whole request may wait as long as the reply takes."""
    began = time.monotonic()
    reply = httpx.post(impatient + "/v1/chat/completions", json=BODY | {"max_tokens": 600}, timeout=120)
    assert reply.json()["usage"]["completion_tokens"] == 600
    assert time.monotonic() - began > SHORT
