"""What unknown people and web pages can do with a server: next to nothing."""

import contextlib
import re
import socket
import time
from array import array

import httpx
import pytest

from linalign.alignment_core.scheduling.kv_cache import hash_pages
from linalign.alignment_core.scheduling.sequence import Branch
from linalign.server.replies.submission import _salt
from linalign.server.settings_loading import load_settings
from tests.serving import serving

pytestmark = pytest.mark.slow

PAGE = "https://chat.example.org"
BODY = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about the towns of our coast. " * 8}]}
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.fixture(scope="module")
def shared(embedded, tmp_path_factory):  # noqa: ARG001 - loads the model first, so that the server finds its copy
    """A server with two keys, behind a proxy, that allows the pages of one origin. Yields its URL and its log file."""
    file = tmp_path_factory.mktemp("log") / "stderr"
    args = ("--api-keys", "one,two", "--cors-origins", PAGE)
    with file.open("w") as stderr, serving(*args, "--forwarded-allow-ips", "127.0.0.1", stderr=stderr) as (url, _):
        yield url, file


# Web pages


def test_other_origins_are_refused_by_default(url):
    response = httpx.options(url + "/v1/chat/completions", headers=PREFLIGHT)
    assert response.status_code == 405
    response = httpx.get(url + "/v1/models", headers={"Origin": PAGE})
    assert not any(name.startswith("access-control-") for name in response.headers)


def test_content_types_that_need_no_preflight_are_refused(url):
    body = '{"model": "smollm2", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        headers = {"Origin": PAGE} | ({"Content-Type": kind} if kind else {})
        assert httpx.post(url + "/v1/chat/completions", content=body, headers=headers).status_code == 400


def test_only_listed_origins_are_allowed(shared):
    url, _ = shared
    response = httpx.options(url + "/v1/chat/completions", headers=PREFLIGHT)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert "access-control-allow-credentials" not in response.headers
    for key, status in (("one", 200), ("x", 401)):
        response = httpx.get(url + "/v1/models", headers={"Origin": PAGE, "Authorization": f"Bearer {key}"})
        assert response.status_code == status
        assert response.headers["Access-Control-Allow-Origin"] == PAGE  # so that the page can read the error
        assert "X-Request-Id" in response.headers["Access-Control-Expose-Headers"]
    other = httpx.options(url + "/v1/chat/completions", headers=PREFLIGHT | {"Origin": "https://evil.example.org"})
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


# Client addresses


def logged_client(file, id):
    deadline = time.monotonic() + 10
    while not (match := re.search(rf"\[{id}\]: .* client=(\S+)", file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return match[1]


def test_forwarded_addresses_are_trusted_from_listed_proxies(shared):
    url, file = shared
    httpx.get(url + "/v1/models", headers={"X-Forwarded-For": "192.0.2.7", "X-Request-Id": "proxied"})
    assert logged_client(file, "proxied") == "192.0.2.7"


def test_forwarded_addresses_are_not_trusted_by_default(tmp_path):
    for args in ((), ("--forwarded-allow-ips", "192.0.2.1")):
        with (tmp_path / "stderr").open("w") as stderr, serving(*args, stderr=stderr) as (url, _):
            httpx.get(url + "/v1/models", headers={"X-Forwarded-For": "192.0.2.7", "X-Request-Id": "forged"})
            assert logged_client(tmp_path / "stderr", "forged") == "127.0.0.1"


@pytest.mark.parametrize(
    ("is_reachable", "hosts"),
    [
        (False, ("127.0.0.1", "127.3.2.1", "::1", "localhost")),
        (True, ("0.0.0.0", "::", "192.0.2.1", "gpu.example.org")),
    ],
)
def test_addresses_that_other_machines_can_reach(hosts, is_reachable):
    assert {load_settings(["--host", host]).is_reachable for host in hosts} == {is_reachable}


@pytest.mark.parametrize(
    ("args", "warns"),
    [(["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-keys", "x"], False), ([], False)],
)
def test_a_server_that_is_open_to_everyone_warns(tmp_path, args, warns):
    with (tmp_path / "stderr").open("w") as stderr, serving(*args, stderr=stderr):
        pass
    assert ("*** Anyone who can reach 0.0.0.0 can use this server" in (tmp_path / "stderr").read_text()) is warns


# Prefixes of other keys


def cached_tokens(url, key=None, path="/v1/chat/completions", **fields):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = BODY | {"max_tokens": 1, "principle": "Be brief.", **fields}
    if path == "/v1/responses":
        body |= {"input": body.pop("messages"), "max_output_tokens": body.pop("max_tokens")}
    usage = httpx.post(url + path, json=body, headers=headers, timeout=60).json()["usage"]
    return usage["alignment_details"]["prefix_cached_tokens"]


def test_a_key_does_not_hit_prefixes_of_another(shared):
    url, _ = shared
    first = cached_tokens(url, "one")
    assert cached_tokens(url, "one") > first + 50
    assert cached_tokens(url, "two") == first  # only what its own branches share
    assert cached_tokens(url, "two") > first + 50


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_salt_shares_prefixes_only_with_the_same_salt(url, path):
    messages = [{"role": "user", "content": f"Tell me about the lakes of our country. {path} " * 8}]

    def cached(**salt):
        return cached_tokens(url, path=path, messages=messages, **salt)

    first = cached()  # other tests may have cached the common beginning of prompts
    assert cached(cache_salt=f"a{path}") == cached(cache_salt=f"b{path}") <= first  # only what own branches share
    for salt in ({"cache_salt": f"a{path}"}, {"cache_salt": f"b{path}"}, {}):
        assert cached(**salt) > first + 50


def test_a_salt_changes_no_reply(url):
    body = BODY | {"max_tokens": 24, "temperature": 0, "principle": "Be brief."}
    replies = [
        httpx.post(url + "/v1/chat/completions", json=body | salt, timeout=60).json()["choices"][0]["message"]
        for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "a"})
    ]
    assert replies[0]["content"]
    assert replies[0] == replies[1] == replies[2]


def test_empty_and_too_long_salts_are_refused(url):
    for salt in ("", "x" * 257, 5):
        response = httpx.post(url + "/v1/chat/completions", json=BODY | {"cache_salt": salt})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "cache_salt"


# URLs in requests


def test_the_server_fetches_no_url_of_a_request(url):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.json"
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": address}}}
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}]
        for fields in ({"response_format": schema}, {"messages": image}):
            assert httpx.post(url + "/v1/chat/completions", json=BODY | fields, timeout=60).status_code == 400
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


# Errors


ERRORS = [
    ("GET", "/nowhere", None),
    ("GET", "/playground/../../../etc/passwd", None),
    ("GET", "/playground/nothing.js", None),
    ("DELETE", "/v1/models", None),
    ("POST", "/v1/chat/completions", b"{"),
    ("POST", "/v1/chat/completions", b"\xff\xfe"),
    ("POST", "/v1/chat/completions", b'{"model": "/etc/passwd", "messages": [{"role": "user", "content": "x"}]}'),
    ("POST", "/v1/completions", b'{"model": "smollm2", "prompt": "x", "structured_outputs": {"regex": "("}}'),
    ("POST", "/v1/completions", b'{"model": "smollm2", "prompt": "x", "structured_outputs": {"grammar": "?"}}'),
    ("POST", "/tokenize", b'{"model": "smollm2", "prompt": 5}'),
    ("POST", "/detokenize", b'{"model": "smollm2", "tokens": [99999999]}'),
]


@pytest.mark.parametrize(("method", "path", "body"), ERRORS)
def test_errors_reveal_nothing_about_the_machine(url, method, path, body):
    response = httpx.request(method, url + path, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= response.status_code < 500
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    text = response.text.replace("/etc/passwd", "").replace(path, "")
    assert not re.search(r"Traceback|File \"|\.py\b|site-packages|/home/|/root/|/usr/|/work|/tmp/|0x[0-9a-f]{6}", text)
    assert socket.gethostname() not in text


@pytest.mark.parametrize(
    "junk", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"x" * 70_000]
)
def test_invalid_http_is_refused_and_affects_no_other_client(url, junk):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
        assert answer == b"" or re.match(rb"HTTP/1\.1 4\d\d ", answer)
    assert httpx.get(url + "/health").status_code == 200


def test_different_salts_give_different_page_hashes():
    """An attacker who knows a page's tokens may send their bytes, or the page's digest, as a salt."""
    tokens, others = list(range(10, 26)), list(range(40, 56))
    victim = hash_pages(Branch([*tokens, *others], salt=_salt(None, None)), 2, 16)
    forged = [b"".join(array("i", tokens)[i : i + 1].tobytes() for i in range(16)).decode(), victim[0].hex()]
    salts = [
        _salt(None, text) for text in (*forged, *(f"{mark}{text}" for mark in ("page", "salt") for text in forged))
    ]
    salts += [_salt(bytes(range(32)), None), _salt(None, bytes(range(32)).decode()), victim[0], b""]
    names = [name for salt in salts for name in hash_pages(Branch([*others, *tokens], salt=salt), 2, 16)]
    assert len(set(names)) == len(names)
    assert not set(victim) & set(names)
