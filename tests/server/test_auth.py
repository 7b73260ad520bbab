"""Servers with API keys: every route requires a key, except those that are meant to be open."""

import gc
import http.client
import types

import httpx
import openai
import pytest
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from linalign.server.app import create_app
from linalign.server.local_engine import LocalEngine
from linalign.server.settings import Settings
from linalign.server.settings_loading import load_settings
from tests.engines import make_engine
from tests.serving import KEY, serving


def routes(embedded):
    """Every (method, path) of the application, with its parameters filled in."""
    app = create_app(LocalEngine(make_engine(embedded, num_pages=8)), Settings())
    result = []

    def walk(routes, prefix=""):
        for route in routes:
            if isinstance(route, Route):
                path = prefix + route.path.replace("{id:path}", "smollm2")
                result.extend((method, path) for method in route.methods)
            elif isinstance(route, Mount):
                result.append(("GET", prefix + route.path + "/main.js"))
            else:
                walk(route.original_router.routes, prefix)  # a router that FastAPI includes

    walk(app.routes)
    return result


def test_no_route_is_served_without_a_key(closed, embedded):
    app_routes = routes(embedded)
    paths = {path for _, path in app_routes}
    assert {
        "/v1/chat/completions",
        "/v1/models",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/tokenize",
        "/version",
    } <= paths
    opened = set()
    others = [("GET", "/nowhere"), ("GET", "/v1/models/playground/x"), ("POST", "/v1/chat/completions/")]
    for method, path in [*app_routes, *others]:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic other-key"},
        ):
            response = httpx.request(method, closed + path, headers=headers, json={} if method == "POST" else None)
            if response.status_code != 401:
                opened.add(path)
            elif method != "HEAD":
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
    assert opened == {"/", "/health", "/playground/main.js"}


@pytest.mark.parametrize(
    "path", ["/playground/../v1/models", "//", "/playground/%2e%2e/metrics", "/health/", "/HEALTH"]
)
def test_paths_that_resemble_open_ones_need_a_key(closed, path):
    host = closed.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status in (401, 404), response.read()
    assert b"data" not in response.read()


def test_each_key_is_served(closed):
    for key in (KEY, "other-key"):
        client = httpx.Client(base_url=closed, headers={"Authorization": f"bearer {key}".encode()})
        assert client.get("/v1/models").status_code == 200
        assert client.get("/nowhere").status_code == 404


def test_the_sdk(closed):
    client = openai.OpenAI(base_url=closed + "/v1", api_key="other-key", max_retries=0)
    fields = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert client.chat.completions.create(**fields).choices[0].message.content
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=closed + "/v1", api_key="none", max_retries=0).chat.completions.create(**fields)


@pytest.fixture(scope="module")
def server_with_key_file(embedded, tmp_path_factory):  # noqa: ARG001 - converts the model before the server starts
    """A server with keys in a file and open metrics."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# for tests\n{KEY}\nother-key\n")
    with serving("--api-keys-file", str(file), "--metrics-without-key") as (url, process):
        yield url, process


def test_keys_of_a_file_and_open_metrics(server_with_key_file, embedded):
    url, _ = server_with_key_file
    for key in (KEY, "other-key"):
        assert httpx.get(url + "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer # for tests"}).status_code == 401
    opened = {
        path
        for method, path in routes(embedded)
        if httpx.request(method, url + path, json={} if method == "POST" else None).status_code != 401
    }
    assert opened == {"/", "/health", "/metrics", "/playground/main.js"}


@pytest.mark.parametrize("source", ["flag", "variable", "config", "file"])
def test_no_object_of_the_application_holds_a_key(tiny, tmp_path, monkeypatch, source):
    loaded, _ = tiny
    secret = "-".join(["a", "very", "secret", source])  # built at run time, so that it is not a constant of this test
    file = tmp_path / "file"
    file.write_text(f"api_keys: [{secret}]" if source == "config" else secret)
    monkeypatch.setenv("LINALIGN_API_KEYS", secret if source == "variable" else "another-key")
    args = {"flag": ["--api-keys", secret], "config": ["--config", str(file)], "file": ["--api-keys-file", str(file)]}
    if source == "config":
        monkeypatch.delenv("LINALIGN_API_KEYS")
    settings = load_settings(args.get(source, []))
    app = create_app(LocalEngine(make_engine(loaded, num_pages=8)), settings)
    monkeypatch.delenv("LINALIGN_API_KEYS", raising=False)
    client = TestClient(app)
    assert client.get("/v1/models", headers={"Authorization": f"Bearer {secret}"}).status_code == 200
    assert client.get("/v1/models").status_code == 401
    pending, seen = [app, settings], set()
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType | types.FrameType | pytest.MonkeyPatch):
            continue
        seen.add(id(value))
        assert not (isinstance(value, str | bytes) and secret in str(value)), "a key is kept"
        pending += gc.get_referents(value)
    assert len(seen) > 10_000


def test_a_path_prefix_changes_neither_open_paths_nor_field_names(embedded):
    """Behind a proxy or in Ray, all paths begin with root_path."""
    app = create_app(LocalEngine(make_engine(embedded, num_pages=8)), Settings(api_keys=(KEY,)))
    with TestClient(app, root_path="/one") as client:
        assert client.get("/one/health").status_code == 200
        assert client.get("/one/playground/main.js").status_code == 200
        assert client.get("/one/v1/models").status_code == client.get("/one/metrics").status_code == 401
        assert client.get("/one/one/health").status_code == client.get("/onehealth").status_code == 401
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"model": "smollm2", "prompt": "word " * 10_000}
        error = client.post("/one/v1/completions", json=body, headers=headers).json()["error"]
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_file_of_keys_that_everyone_can_read_is_warned_of(tmp_path, mode, warns):
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    keys.chmod(mode)
    with (tmp_path / "stderr").open("w") as stderr, serving("--api-keys-file", str(keys), stderr=stderr):
        pass
    assert ("All users of this machine can read the API keys" in (tmp_path / "stderr").read_text()) is warns
