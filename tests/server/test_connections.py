"""Connections that need no key: floods of requests, foreign Host headers, invalid HTTP."""

import contextlib
import json
import re
import socket
import time

import httpx
import pytest

from linalign.server.http_protocol import MAX_PIPELINED
from linalign.server.settings_loading import load_settings
from tests.counts import counted
from tests.serving import serving

pytestmark = pytest.mark.slow

HELLO = json.dumps({"model": "smollm2", "prompt": "Hello", "max_tokens": 1, "temperature": 0}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def small(serving_small):
    with serving_small() as (url, _):
        yield url


@contextlib.contextmanager
def connected(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        yield connection


def receive_all(connection):
    """All bytes until the connection ends."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def resident(url):
    (size,) = re.findall(r"^process_resident_memory_bytes (\S+)$", httpx.get(url + "/metrics").text, re.MULTILINE)
    return float(size)


def test_connections_that_send_thousands_of_requests_at_once_are_cut_off(small):
    """Each connection sends 228 KB and reads no response until all have sent."""
    httpx.get(small + "/health")
    before = resident(small)
    with contextlib.ExitStack() as stack:
        flooding = [stack.enter_context(connected(small)) for _ in range(counted(30, 90))]
        for connection in flooding:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /x HTTP/1.1\r\n\r\n" * 12_000)
        assert httpx.get(small + "/health", timeout=10).status_code == 200
        answers = [receive_all(connection) for connection in flooding]
    assert max(answer.count(b"HTTP/1.1 ") for answer in answers) <= 1 + MAX_PIPELINED
    assert resident(small) - before < 50e6


def test_pipelined_requests_are_answered_in_order(small):
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: %d\r\n\r\n%s" % (len(HELLO), HELLO)
    with connected(small) as connection:
        connection.sendall(
            request + HEALTH * (MAX_PIPELINED - 1) + HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        )
        answer = receive_all(connection)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200"] * (1 + MAX_PIPELINED)
    assert answer.index(b"text_completion") < answer.rindex(b"HTTP/1.1")


@pytest.mark.parametrize("extension", [b"", b";x=y"])
def test_a_body_in_chunks_of_one_byte_is_accepted(small, extension):
    body = HELLO + b" " * 20_000
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    pieces = b"".join(b"1%s\r\n%c\r\n" % (extension, byte) for byte in body)
    with connected(small) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")
        answer = receive_all(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"text_completion" in answer


@pytest.mark.parametrize(
    "junk",
    [
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nA: \x01\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
    ],
)
@pytest.mark.parametrize("before", [b"", HEALTH])
def test_invalid_http_gets_an_error_in_openais_shape(small, junk, before):
    with connected(small) as connection:
        if before:
            connection.sendall(before)
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += connection.recv(65536)
        connection.sendall(junk)
        answer = receive_all(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n")
    error = {"message": "this is no valid HTTP request", "type": "invalid_request_error", "param": None}
    assert json.loads(body)["error"] == error | {"code": "invalid_http"}


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_a_request_with_an_upgrade_is_answered_and_logged(tmp_path, protocol):
    headers = {"Connection": "Upgrade", "Upgrade": protocol, "X-Request-Id": "upgrade", "Sec-WebSocket-Version": "13"}
    with (tmp_path / "stderr").open("w") as stderr, serving(stderr=stderr) as (url, _):
        assert httpx.get(url + "/v1/models", headers=headers).status_code == 200
        assert httpx.get(url + "/v1/nothing", headers=headers | {"X-Request-Id": "nowhere"}).status_code == 404
        deadline = time.monotonic() + 10
        while len(lines := re.findall(r"\[(?:upgrade|nowhere)\]: .*", (tmp_path / "stderr").read_text())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert ["status=200" in lines[0], "status=404" in lines[1]] == [True, True]
    assert "upgrade request" not in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_the_body_of_an_upgrade_request_is_read(small, protocol):
    """Java's HTTP client sends `Upgrade: h2c`. The next request of the connection is answered, too."""
    body = json.dumps({"model": "smollm2", "prompt": "Hi", "max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: "
    head += protocol + b"\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nContent-Length: %d\r\n" % len(body)
    head += b"Content-Type: application/json\r\n\r\n"
    for pieces in ([head + body + LAST], [head, body, LAST], [head[:90], head[90:] + body[:5], body[5:] + LAST]):
        with connected(small) as connection:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.05)  # so that the pieces arrive separately, which only makes the test harder
            received = receive_all(connection)
        assert received.count(b"HTTP/1.1 200 OK") == 2
        assert b'"object":"text_completion"' in received
        assert b'{"status":"ok"}' in received


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_a_body_after_an_upgrade_request_is_not_parsed_as_a_request(small, protocol):
    """The server must not answer a request that is inside a body."""
    for num_slices in (1, 2, 3):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: " + protocol
        head += b"\r\nContent-Type: application/json\r\nContent-Length: %06d\r\n\r\n"
        padding = b" " * (4096 * num_slices - len(head) - 2 - len(HELLO))  # the server parses slices of 4096 bytes
        body = HELLO + padding + HEALTH
        with connected(small) as connection:
            connection.sendall(head % len(body) + body + LAST)
            assert receive_all(connection).count(b"HTTP/1.1 ") == 2


@pytest.mark.parametrize("length", [100, 5000, 100_000])
def test_a_client_that_half_closes_the_connection_is_answered(small, length):
    """The client closes its sending half, as `nc -N` does."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length + b"x" * length
    for _ in range(5):
        with connected(small) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection).startswith(b"HTTP/1.1 200")


# Host headers


OF_THIS_MACHINE = (
    "localhost",
    "LOCALHOST:8000",
    "127.0.0.1:1",
    "127.9.9.9",
    "[::1]",
    "[::1]:80",
    "[::ffff:127.0.0.1]",
    "a.localhost",
    "localhost.",
)
OF_OTHERS = (
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "0.0.0.0",
    "192.0.2.1",
    "[::1]evil.example",
    "localhost:evil.example",
    "::1",
    "",
)


def statuses(url, hosts, path="/v1/models", **headers):
    return {httpx.get(url + path, headers={"Host": host, **headers}).status_code for host in hosts}


def test_a_server_on_loopback_without_keys_allows_only_local_hosts(small):
    """Otherwise a page whose name resolves to 127.0.0.1 would have the server's own origin (DNS rebinding)."""
    for path in ("/v1/models", "/health", "/", "/metrics", "/playground/main.js"):
        assert statuses(small, OF_THIS_MACHINE, path) == {200}
        assert statuses(small, OF_OTHERS, path) == {403}
    refusal = httpx.post(small + "/v1/completions", content=HELLO, headers={"Host": "evil.example"})
    assert refusal.status_code == 403
    assert refusal.json()["error"]["code"] == "host_not_allowed"
    assert "--allowed-hosts" in refusal.json()["error"]["message"]
    with connected(small) as connection:  # HTTP/1.0 without a Host header, so not a browser
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert receive_all(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("args", "allowed_names"),
    [
        ([], ()),
        (["--allowed-hosts", "chat.example.org,10.0.0.1"], ("chat.example.org", "10.0.0.1")),
        (["--allowed-hosts", "fe80::1"], ("fe80::1",)),
        (["--allowed-hosts", "*"], None),
        (["--api-keys", "x"], None),
        (["--host", "0.0.0.0"], None),
        (["--host", "0.0.0.0", "--allowed-hosts", "chat.example.org"], ("chat.example.org",)),
        (["--api-keys", "x", "--allowed-hosts", "chat.example.org"], ("chat.example.org",)),
    ],
)
def test_the_allowed_hosts_of_a_server(args, allowed_names):
    assert load_settings(args).allowed_names == allowed_names


@pytest.mark.parametrize("host", ["https://chat.example.org", "chat.example.org:80", "Chat.example.org", "a/b", ""])
def test_invalid_host_names_are_refused(host):
    with pytest.raises(ValueError, match="is not a host name"):
        load_settings(["--allowed-hosts", host or ","])


def test_an_allowed_host_is_answered(serving_small):
    with serving_small("--allowed-hosts", "chat.example.org") as (url, _):
        assert statuses(url, ("chat.example.org", "CHAT.example.org:8000", "localhost")) == {200}
        assert statuses(url, ("evil.example", "x.chat.example.org")) == {403}
