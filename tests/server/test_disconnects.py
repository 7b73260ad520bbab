"""A client that disconnects at any moment: its work is cancelled, and other clients are not affected."""

import contextlib
import gc
import http.client
import itertools
import json
import socket
import threading
import time

import httpx
import pytest

from tests.counts import counted

pytestmark = pytest.mark.slow

LONG = 4000  # tokens of replies that are cancelled; drawing all of them takes more than 20 seconds
PATCH = """
import asyncio, contextlib, pathlib, time
from linalign.alignment_core.decoding import grammars
from linalign.alignment_core.loading import loader
from linalign.server.routes import chat_completions, completions, responses
loader._eos_token_ids = lambda *_: frozenset({{3}})  # which nobody draws: replies end by their length only
here = pathlib.Path({directory!r})
compile, original = grammars.Grammars._compile, chat_completions.event_stream
def held_and_compiled(self, structure):
    (here / "compiling").touch()
    while (here / "held").exists():
        time.sleep(0.01)
    matcher = compile(self, structure)
    (here / "compiled").touch()
    return matcher
def event_stream(events, replies):
    async def held_and_ended():
        async with contextlib.aclosing(events):
            async for event in events:
                if event.data == "[DONE]" or '"type":"response.incomplete"' in event.data:
                    (here / "ending").touch()
                    try:
                        while (here / "held").exists():
                            await asyncio.sleep(0.01)
                    except asyncio.CancelledError:
                        (here / "left").touch()
                        raise
                yield event
        (here / "ended").touch()
    return original(held_and_ended(), replies)
grammars.Grammars._compile = held_and_compiled
for module in (chat_completions, completions, responses):
    module.event_stream = event_stream
"""
COMPLAINTS = ("Traceback", "never retrieved", "never awaited", "Exception", "ERROR", "was destroyed")
PRINCIPLE = {"principle": "Mention the sea.", "alignment_ratio": 2}
SEVERAL = {"n": 2, "max_tokens": LONG}
numbers = itertools.count()


def messages(text):
    return [{"role": "user", "content": text}]


# By name: the path, a function from a text to the body, and the number of sequences.
KINDS = {
    "chat": ("/v1/chat/completions", lambda text: {"messages": messages(text), "max_tokens": LONG, **PRINCIPLE}, 1),
    "chat with n = 2": ("/v1/chat/completions", lambda text: {"messages": messages(text), **SEVERAL, **PRINCIPLE}, 2),
    "completions of two prompts with n = 2": (
        "/v1/completions",
        lambda text: {"prompt": [text, "B" + text], **SEVERAL},
        4,
    ),
    "responses": ("/v1/responses", lambda text: {"input": text, "max_output_tokens": LONG, **PRINCIPLE}, 1),
}


class Server:
    """A server. directory: Files in which it marks its progress, and in which a test marks that it must pause."""

    def __init__(self, url, directory, stderr):
        self.url, self.directory, self._stderr = url, directory, stderr
        self.undisturbed = {n: self.bystander(n=n) for n in (1, 4)}

    def complaints(self):
        self._stderr.flush()
        text = (self.directory / "stderr").read_text()
        return [line for line in text.splitlines() if any(word in line for word in COMPLAINTS)]

    def counts(self):
        """Numbers of running and of waiting sequences, and the share of pages in use."""
        values = {}
        for line in httpx.get(self.url + "/metrics").text.splitlines():
            if line.startswith("linalign:"):
                name, value = line.split()
                values[name.removeprefix("linalign:").partition("{")[0]] = float(value)
        return tuple(values[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))

    def bystander(self, started=None, max_tokens=60, n=1):
        """Stream a reply; returns the texts of its choices. started: An Event to set at the first token."""
        body = {"model": "smollm2", "messages": messages("Tell me about towns."), "temperature": 0, "stream": True}
        body |= {"max_tokens": max_tokens, "n": n, **(PRINCIPLE if n == 1 else {})}
        texts = [""] * n
        with httpx.stream("POST", self.url + "/v1/chat/completions", json=body, timeout=120) as response:
            assert response.status_code == 200, response.read()
            for line in filter(None, response.iter_lines()):
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    texts[choice["index"]] += choice["delta"].get("content", "")
                    if started is not None and choice["delta"].get("content"):
                        started.set()
        assert line == "data: [DONE]"
        return texts


@contextlib.contextmanager
def disturbed(server, n=1, max_tokens=60, again=False):
    """Run another client's stream around the block. It must be unchanged, and afterwards nothing may be left.

    again: Repeat the stream until the block has ended.
    """
    started, over, texts = threading.Event(), threading.Event(), []

    def follow():
        texts.append(server.bystander(started, max_tokens, n))
        while again and not over.is_set():
            texts.append(server.bystander(started, max_tokens, n))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        until(lambda: started.is_set() or not thread.is_alive())
        yield
    finally:
        over.set()
        thread.join(120)
    expected = server.undisturbed[n]
    assert texts
    for stream in texts:
        assert [text[: len(expected[0])] for text in stream] == expected
    until(lambda: server.counts() == (0, 0, 0))
    assert server.complaints() == []


def until(condition, seconds=20):
    """Wait for the condition. The time limit is shorter than a reply of LONG tokens takes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def client(server, path, body, part=1.0):
    """Send a request, or part of its body; yield the socket, and disconnect at the end."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps({"model": "smollm2", "temperature": 0, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + data[: int(len(data) * part)])
        yield connection


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def server(serving_small, marks):
    with (marks / "stderr").open("w") as stderr:
        patch = PATCH.format(directory=str(marks))
        with serving_small("--max-num-seqs", "4", patch=patch, stderr=stderr) as (url, _):
            yield Server(url, marks, stderr)


@pytest.fixture(autouse=True)
def _clear_marks(marks):
    for name in ("held", "compiling", "compiled", "ending", "left", "ended"):
        (marks / name).unlink(missing_ok=True)


each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
whole_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@each_kind
@whole_and_streamed
def test_in_the_queue(server, kind, stream):
    path, body, num_sequences = kind
    with disturbed(server, n=4, max_tokens=200):
        with client(server, path, {**body("Tell me about seas."), "stream": stream}):
            until(lambda: server.counts()[:2] == (4, num_sequences))
        until(lambda: server.counts()[:2] == (4, 0))


@each_kind
@whole_and_streamed
def test_during_the_compilation_of_its_grammar(server, marks, kind, stream):
    path, body, _ = kind
    name = f"word{next(numbers)}"  # unique, so that the grammar is not cached
    schema = {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}
    limits = {"structured_outputs": {"regex": f"{name}[a-z ]*"}}
    if "responses" in path:
        limits = {"text": {"format": {"type": "json_schema", "name": name, "schema": schema}}}
    with disturbed(server):
        (marks / "held").touch()
        with client(server, path, {**body("Tell me about seas."), **limits, "stream": stream}):
            until((marks / "compiling").exists)
        (marks / "held").unlink()
        until((marks / "compiled").exists)


@each_kind
@whole_and_streamed
def test_during_prefill(server, kind, stream):
    """The prompt has more than a thousand new tokens, and a step computes 128."""
    path, body, _ = kind
    text = f"{next(numbers)} seas. " + " ".join(str(number) for number in range(counted(300, 800)))
    with disturbed(server):
        with client(server, path, {**body(text), "stream": stream}) as connection:
            until(lambda: server.counts()[0] > 1)
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                assert b'"delta":{"content":"' not in connection.recv(100_000).replace(b'"content":""', b"")
        until(lambda: server.counts()[0] <= 1)


@each_kind
def test_in_the_middle_of_a_stream(server, kind):
    path, body, _ = kind
    with disturbed(server):
        with client(server, path, {**body("Tell me about seas."), "stream": True}) as connection:
            received = b""
            while received.count(b"\ndata: {") < 20:
                part = connection.recv(65536)
                assert part
                received += part
        until(lambda: server.counts()[0] <= 1)


@each_kind
def test_during_a_reply_that_is_not_streamed(server, kind):
    path, body, num_sequences = kind
    with disturbed(server, max_tokens=150):
        with client(server, path, body("Tell me about seas.")):
            until(lambda: server.counts()[0] == min(4, 1 + num_sequences))
            usage = server.counts()[2]
            until(lambda: server.counts()[2] > usage)  # it has allocated another page
        until(lambda: server.counts()[0] <= 1)


@each_kind
def test_between_the_last_token_and_the_streams_end(server, marks, kind):
    path, body, _ = kind
    short = {name: 3 if value == LONG else value for name, value in body("Tell me about seas.").items()}
    with disturbed(server, max_tokens=120):
        (marks / "held").touch()
        with client(server, path, {**short, "stream": True}) as connection:
            until((marks / "ending").exists)
            connection.setblocking(False)
            received = connection.recv(1_000_000)
            assert b"data: " in received
            assert b"[DONE]" not in received
        until((marks / "left").exists)
        assert not (marks / "ended").exists()
        (marks / "held").unlink()


@pytest.mark.parametrize("part", [0.0, 0.5])
@each_kind
def test_before_all_of_its_body_is_sent(server, kind, part):
    path, body, _ = kind
    with disturbed(server, max_tokens=150):
        with client(server, path, body("Tell me about seas."), part):
            pass
        assert server.counts()[:2] == (1, 0)


def test_clients_that_disconnect_at_random_moments(server):
    """Clients leave one after the other, the first at once and the last after a third of a second."""
    num_clients = counted(30, 100)
    with disturbed(server, again=True):
        for number in range(num_clients):
            path, body, _ = list(KINDS.values())[number % 4]
            with client(
                server, path, {**body(f"Tell me about sea {number}."), "stream": number % 3 == 0}
            ) as connection:
                connection.settimeout(number / num_clients / 3)
                with contextlib.suppress(TimeoutError, BlockingIOError):
                    connection.recv(100)


@whole_and_streamed
def test_a_client_that_leaves_frees_its_pages_within_two_steps(own_server, stream, caplog):
    url, engine = own_server
    body = {"model": "smollm2", "messages": messages("Tell me about seas."), **PRINCIPLE}
    steps_after_abort, abort = [], engine.abort

    def watch(request_id):
        abort(request_id)
        steps_after_abort.append(engine.runner.num_forwards)

    engine.abort = watch
    host = url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps({**body, "max_tokens": LONG, "stream": stream}),
            {"Content-Type": "application/json"},
        )
        until(lambda: engine.runner.num_forwards > 3)
    until(lambda: engine.pool.num_free == engine.pool.num_pages and steps_after_abort)
    assert engine.runner.num_forwards <= steps_after_abort[0] + 2
    assert httpx.post(url + "/v1/chat/completions", json={**body, "max_tokens": 4}, timeout=60).status_code == 200
    gc.collect()  # an exception that was never retrieved is logged when it is deleted
    assert "never retrieved" not in caplog.text


def test_with_another_request_behind_it_on_the_same_connection(server):
    """uvicorn reports a disconnect only to the latest request of a connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with disturbed(server), socket.create_connection((host, int(port)), timeout=60) as connection:
        running, _, _ = server.counts()
        content = json.dumps({"model": "smollm2", "messages": messages("Towns"), "max_tokens": LONG}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        until(lambda: server.counts()[0] > running)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.2)  # so that the server has read it
