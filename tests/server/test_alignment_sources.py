"""Principle and ratio from the body, headers, the model's name or the API key; what was applied is in the response."""

import json
import subprocess
import sys

import httpx
import openai
import pytest

from linalign.server.app import REQUEST_ID
from linalign.server.presets import preset_named
from linalign.server.protocol.generation import Preset
from linalign.server.settings_loading import load_settings
from tests.server.test_chat import CHAT, PRINCIPLE, create
from tests.serving import serving

pytestmark = pytest.mark.slow

KEYS = "plain-key\nteaching-key preset=teacher@4\n# a comment\nbrief-key  preset=concise\n"
PRESETS = """
teacher: {principle: Explain it to a child., alignment_ratio: 3, alignment_method: cfg}
concise: {principle: Be brief.}
a@b: {principle: Has an odd name.}
"""
BODIES = {
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 4, "temperature": 0},
    "/v1/completions": {"prompt": "Towns", "max_tokens": 4, "temperature": 0},
    "/v1/responses": {"input": CHAT, "max_output_tokens": 4, "temperature": 0},
}
HEADERS = {"X-Linalign-Principle": "Be%20kind%20to%20%C3%89mile.", "X-Linalign-Ratio": "1.5"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "keys").write_text(KEYS)
    (folder / "presets.yaml").write_text(PRESETS)
    return "--api-keys-file", str(folder / "keys"), "--presets", str(folder / "presets.yaml")


@pytest.fixture(scope="module")
def open_server(embedded, files):  # noqa: ARG001 - loads the model first, so that the server finds the converted copy
    with serving(*files, "--cors-origins", "https://page.example") as (url, _):
        yield url


@pytest.fixture(scope="module")
def narrow_server(embedded, files):  # noqa: ARG001
    with serving(*files, "--alignment-from", "body") as (url, _):
        yield url


def post(url, path, key="plain-key", headers=None, **fields):
    headers = {"Authorization": f"Bearer {key}", **(headers or {})}
    return httpx.post(url + path, json=BODIES[path] | fields, headers=headers, timeout=60)


def applied(response):
    assert response.status_code == 200, response.text
    details = response.json()["usage"]["alignment_details"]
    names = ("principle_from", "ratio_from", "ratios", "method")
    if "principle_from" not in details:
        assert "X-Linalign-Alignment" not in response.headers
        return None
    source, ratio_from, ratios, method = (details[name] for name in names)
    text = " ".join(map(str, ratios))
    header = f"principle={source}, ratio=({text});from={ratio_from}, method={method}"
    assert response.headers["X-Linalign-Alignment"] == header
    assert details["branches"] == 2
    return source, ratios[0], ratio_from, method


IN_BODY = {"principle": "Be formal.", "alignment_ratio": 2.5}
SOURCES = [
    ({}, None),
    ({"key": "teaching-key"}, ("key", 4.0, "key", "cfg")),
    ({"key": "brief-key"}, ("key", 2.0, "default", "linear")),
    ({"key": "teaching-key", "model": "smollm2:concise"}, ("model", 2.0, "default", "linear")),
    ({"model": "smollm2:teacher@5"}, ("model", 5.0, "model", "cfg")),
    ({"model": "smollm2:teacher"}, ("model", 3.0, "model", "cfg")),
    ({"model": "smollm2:a@b"}, ("model", 2.0, "default", "linear")),
    ({"model": "smollm2:a@b@-1"}, ("model", -1.0, "model", "linear")),
    ({"headers": HEADERS}, ("headers", 1.5, "headers", "linear")),
    ({"headers": HEADERS, "model": "smollm2:teacher", "key": "brief-key"}, ("headers", 1.5, "headers", "cfg")),
    ({"headers": {"X-Linalign-Ratio": "7"}, "key": "teaching-key"}, ("key", 7.0, "headers", "cfg")),
    ({"headers": HEADERS, **IN_BODY}, ("body", 2.5, "body", "linear")),
    ({"headers": HEADERS, "principle": "Be formal."}, ("body", 1.5, "headers", "linear")),
    ({"model": "smollm2@6", "principle": "Be formal."}, ("body", 6.0, "model", "linear")),
    ({"headers": {"X-Linalign-Principle": "", "X-Linalign-Ratio": ""}}, None),
]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("request_fields", "expected"), SOURCES, ids=str)
def test_each_field_comes_from_the_first_source_that_has_it(open_server, path, request_fields, expected):
    assert applied(post(open_server, path, **request_fields)) == expected


def test_a_reply_is_that_of_the_same_fields_in_the_body(open_server, client):
    sdk = openai.OpenAI(base_url=open_server + "/v1", api_key="plain-key", default_headers={
        "X-Linalign-Principle": "".join(f"%{byte:02x}" for byte in PRINCIPLE.encode()), "X-Linalign-Ratio": "2",
    })  # fmt: skip
    expected = create(client, {"principle": PRINCIPLE, "alignment_ratio": 2}).choices[0].message.content
    assert create(sdk).choices[0].message.content == expected
    assert "".join(chunk.choices[0].delta.content or "" for chunk in create(sdk, stream=True)) == expected


def test_streams_say_what_was_applied(open_server):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = post(open_server, path, key="teaching-key", **options)
        assert response.headers["X-Linalign-Alignment"] == "principle=key, ratio=(4.0);from=key, method=cfg"
        (usage,) = [json.loads(line[6:])["usage"] for line in response.text.split("\n\n") if '"usage":{' in line]
        assert usage["alignment_details"]["principle_from"] == "key"
    response = post(open_server, "/v1/responses", key="teaching-key", stream=True)
    assert '"principle_from":"key"' in response.text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"headers": {"X-Linalign-Principle": "%ff"}}, 400, "X-Linalign-Principle"),
        ({"headers": {"X-Linalign-Ratio": "much"}}, 400, "X-Linalign-Ratio"),
        ({"headers": {"X-Linalign-Ratio": "nan"}}, 400, "X-Linalign-Ratio"),
        ({"headers": {"X-Linalign-Ratio": "21"}}, 400, "X-Linalign-Ratio"),
        ({"headers": {"X-Linalign-Principle": "%20"}}, 400, "principle"),
        ({"model": "smollm2@21"}, 400, "model"),
        ({"model": "smollm2:nobody@2"}, 404, "model"),
        ({"model": "smollm2:@"}, 400, "model"),
        ({"model": "smollm2x"}, 404, "model"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused(open_server, path, fields, status, param):
    response = post(open_server, path, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_ratio_without_a_principle_is_named_as_ignored(open_server):
    path = "/v1/chat/completions"
    for fields, name in (
        ({"alignment_ratio": 2}, "alignment_ratio"),
        ({"headers": {"X-Linalign-Ratio": "2"}}, "X-Linalign-Ratio"),
        ({"model": "smollm2@2"}, "model"),
    ):
        response = post(open_server, path, **fields)
        assert applied(response) is None
        assert response.headers["X-Linalign-Ignored"] == name


def test_ratios_of_the_principles_come_from_the_principles(open_server):
    own = [{"text": "Be formal.", "ratio": 3}]
    fields = {"principle": own, "headers": {"X-Linalign-Ratio": "7"}}
    assert applied(post(open_server, "/v1/chat/completions", **fields)) == ("body", 3.0, "body", "linear")


@pytest.mark.parametrize("path", BODIES)
def test_sources_can_be_switched_off(narrow_server, path):
    assert applied(post(narrow_server, path, **IN_BODY)) == ("body", 2.5, "body", "linear")
    assert applied(post(narrow_server, path, key="teaching-key")) is None
    refused = post(narrow_server, path, headers=HEADERS)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "alignment_source_disabled")
    for model in ("smollm2:teacher", "smollm2@2"):
        assert post(narrow_server, path, model=model).status_code == 404
    listed = httpx.get(narrow_server + "/v1/models", headers={"Authorization": "Bearer plain-key"}).json()["data"]
    assert [model["id"] for model in listed] == ["smollm2"]


def test_the_body_can_be_switched_off(files):
    with serving(*files, "--alignment-from", "headers,model,key") as (url, _):
        refused = post(url, "/v1/chat/completions", **IN_BODY)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] in IN_BODY
        assert applied(post(url, "/v1/chat/completions", headers=HEADERS)) == ("headers", 1.5, "headers", "linear")


def test_pages_of_other_origins_may_send_and_read_the_headers(open_server):
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization,x-linalign-principle,x-linalign-ratio"
    allowed = httpx.options(open_server + "/v1/chat/completions", headers=ask)
    assert allowed.status_code == 200
    assert "x-linalign-principle" in allowed.headers["Access-Control-Allow-Headers"].lower()
    response = post(open_server, "/v1/chat/completions", headers={"Origin": "https://page.example"})
    exposed = response.headers["Access-Control-Expose-Headers"].split(", ")
    assert {REQUEST_ID, "X-Linalign-Alignment", "X-Linalign-Ignored"} <= set(exposed)


def test_the_log_says_where_a_principle_came_from(files, tmp_path):
    with (tmp_path / "stderr").open("w") as stderr, serving(*files, stderr=stderr) as (url, _):
        post(url, "/v1/chat/completions", headers=HEADERS)
    log = (tmp_path / "stderr").read_text()
    assert "principle_from=headers" in log
    assert "mile" not in log  # of the principle


def test_wrong_presets_of_keys_and_wrong_sources_are_refused_at_the_start(tmp_path):
    for line, words in (("a-key preset=nobody", "nobody, which does not exist"), ("a-key preset=teacher@99", "ratio")):
        (tmp_path / "keys").write_text(line)
        code = "from linalign.server.commands.main import main; main()"
        command = [sys.executable, "-c", code, "serve", "--api-keys-file", str(tmp_path / "keys")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode, words in done.stderr) == (1, True)
    with pytest.raises(ValueError, match="bodie is not one of body, headers, model, key"):
        load_settings(["--alignment-from", "bodie"])


def test_names_of_presets():
    presets = {"a": Preset(principle="x"), "a@b": Preset(principle="y")}
    assert preset_named("a@2", presets) == Preset(principle="x", alignment_ratio=2)
    assert preset_named("a@b", presets).principle == "y"
    assert preset_named("@2", presets) == Preset(alignment_ratio=2)
    for name in ("b", "b@2", ""):
        with pytest.raises(KeyError):
            preset_named(name, presets)
    for name in ("a@", "a@x", "a@inf", "@21"):
        with pytest.raises(ValueError, match="ratio"):
            preset_named(name, presets)
