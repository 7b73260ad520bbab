"""Servers with API keys: closed by default, on every route there is."""

import http.client

import httpx
import openai
import pytest
from starlette.routing import Mount, Route

from server.app import create_app
from server.auth import KeyRequired
from server.settings import Settings
from tests.conftest import make_engine
from tests.serving import KEY


def routes(embedded):
    """Every (method, path) of the application, its parameters filled in."""
    app = create_app(make_engine(embedded, num_pages=8), Settings())
    found = []

    def walk(routes, prefix=""):
        for route in routes:
            if isinstance(route, Route):
                path = prefix + route.path.replace("{id:path}", "smollm2")
                found.extend((method, path) for method in route.methods)
            elif isinstance(route, Mount):
                found.append(("GET", prefix + route.path + "/main.js"))
            else:
                walk(route.original_router.routes, prefix)  # FastAPI's

    walk(app.routes)
    return found


def test_no_route_is_served_without_a_key(closed, embedded):
    found = routes(embedded)
    paths = {path for _, path in found}
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
    for method, path in [*found, ("GET", "/nowhere"), ("POST", "/v1/chat/completions/")]:
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
def test_paths_that_look_open_open_nothing(closed, path):
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
    asked = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert client.chat.completions.create(**asked).choices[0].message.content
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=closed + "/v1", api_key="none", max_retries=0).chat.completions.create(**asked)


def test_keys_are_not_kept():
    middleware = KeyRequired(None, ["a-very-secret-key"])
    assert "a-very-secret-key" not in repr(vars(middleware))
