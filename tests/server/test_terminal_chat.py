"""`linalign chat` in a real terminal (a pty), against a real server."""

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time

import pexpect
import pyte
import pytest
from rich.console import Console

from linalign.server.commands.terminal_chat import shown
from tests.server.test_chat import CHAT, PRINCIPLE, create
from tests.serving import free_port

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-c", "from linalign.server.commands.main import main; main()", "chat"]
QUESTION = CHAT[0]["content"]


class Terminal:
    """A terminal with `linalign chat` in it, 100 columns wide and tall enough for all output."""

    def __init__(self, *args):
        self._screen = pyte.Screen(100, 400)
        self._stream = pyte.Stream(self._screen)
        self._from = 0
        self.views = set()  # all texts that were visible since the last typing
        env = {**os.environ, "TERM": "xterm"}
        command, *before = COMMAND
        self.process = pexpect.spawn(
            command, [*before, *args], env=env, encoding="utf-8", dimensions=(400, 100), timeout=60
        )

    @property
    def text(self):
        """The visible text, from the line that was typed last."""
        buffer = self._screen.buffer  # only lines that were written; `display` has all 400
        written = range(self._from, 1 + max(buffer, default=0))
        lines = ("".join(buffer[y][x].data for x in range(self._screen.columns)) for y in written)
        return "\n".join(line.rstrip() for line in lines).rstrip("\n")

    def type(self, keys):
        self._from = self._screen.cursor.y
        self.views = set()
        self.process.send(keys)

    def until(self, pattern):
        deadline = time.monotonic() + 60
        while not re.search(pattern, self.text, re.DOTALL):
            assert time.monotonic() < deadline, self.text
            with contextlib.suppress(pexpect.TIMEOUT):
                self._stream.feed(self.process.read_nonblocking(4096, timeout=1))
            self.views.add(self.text)
        return self.text

    def ask(self, line):
        """Type a line; returns the visible text when the next line can be typed."""
        self.type(line + "\n")
        return self.until(r"\n>$")

    def ends(self):
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus


@pytest.fixture
def start_chat(url):
    """A function that starts chats. They are ended after the test."""
    terminals = []

    def start_chat(*args):
        terminal = Terminal(url, *args)
        terminals.append(terminal)
        assert re.search(r"smollm2\S* at ", terminal.until(r"\n>$"))
        return terminal

    yield start_chat
    for terminal in terminals:
        terminal.process.close(force=True)


def words(text):
    return " ".join(re.findall(r"\w+", text))


def test_a_chat_with_a_principle(start_chat, client):
    terminal = start_chat("--temperature", "0", "--max-tokens", "24")
    extra = {"principle": PRINCIPLE, "alignment_ratio": 5}
    assert f"Principle: {PRINCIPLE}" in terminal.ask(f"/principle {PRINCIPLE}")
    assert "Ratio: 5" in terminal.ask("/ratio 5")
    first = create(client, extra).choices[0].message.content
    assert words(terminal.ask(QUESTION)) == words(QUESTION + first)
    assert len(terminal.views) > 2  # it streams

    again = [*CHAT, {"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    second = create(client, extra, messages=again).choices[0].message.content
    assert words(terminal.ask("Why?")) == words("Why? " + second)

    conversation = f"user {QUESTION} assistant {first} user Why? assistant {second}"
    assert words(terminal.ask("/history")) == words("/history " + conversation)
    assert "A new conversation." in terminal.ask("/new")
    assert words(terminal.ask("/history")) == "history"
    assert "No principle." in terminal.ask("/principle")
    plain = create(client).choices[0].message.content
    assert words(terminal.ask(QUESTION)) == words(QUESTION + plain)
    terminal.type("\x04")
    assert terminal.ends() == 0


def test_compare_is_side_by_side(start_chat, client):
    terminal = start_chat("--temperature", "0", "--max-tokens", "24")
    assert "a principle that was set before" in terminal.ask(f"/compare {QUESTION}")
    terminal.ask(f"/principle {PRINCIPLE}")
    terminal.ask("/ratio 3")
    shown = terminal.ask(f"/compare {QUESTION}")
    assert re.search("without the principle.*prompted, ratio 0.*aligned, ratio 3", shown)
    head, *lines = shown.splitlines()[1:]
    borders = [i for i, mark in enumerate(head) if mark in "╭╮"]
    assert len(borders) == 6
    columns = [
        words(" ".join(line[left + 1 : right] for line in lines))
        for left, right in zip(borders[::2], borders[1::2], strict=True)
    ]
    extras = [None, {"principle": PRINCIPLE, "alignment_ratio": 0}, {"principle": PRINCIPLE, "alignment_ratio": 3}]
    assert columns == [words(create(client, extra).choices[0].message.content) for extra in extras]
    assert words(terminal.ask("/history")) == "history"  # comparisons are not part of the conversation


def test_control_c_stops_a_reply_and_keeps_its_text(start_chat):
    terminal = start_chat("--temperature", "1.9")  # such a reply hardly ever ends by itself
    terminal.type("Tell me a very long story about a town.\n")
    terminal.until(r"town\.\n\n?.*\w+ \w+ \w+")
    terminal.process.send("\x03")
    assert len(terminal.until(r"\n>$").split()) < 1500
    assert "assistant" in terminal.ask("/history")
    terminal.ask("/principle Be brief.")
    terminal.type("/compare Tell me a very long story.\n")
    terminal.until(r"╭.*\w+ \w+ \w+")
    terminal.process.send("\x03")
    terminal.until(r"╯\s+>$")


def test_a_reply_longer_than_the_terminal_is_shown_once(url, client):
    question = "Write a long letter to a friend."
    console = pexpect.spawn(
        COMMAND[0], [*COMMAND[1:], url, "--temperature", "0", "--max-tokens", "200"], encoding="utf-8", timeout=60,
        dimensions=(8, 40), env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    screen = pyte.HistoryScreen(40, 8, history=10_000, ratio=0.1)
    stream = pyte.Stream(screen)
    console.expect("> ")
    console.send(question + "\n")
    deadline = time.monotonic() + 60
    while not (screen.history.top and screen.display[screen.cursor.y].rstrip() == ">"):
        assert time.monotonic() < deadline
        with contextlib.suppress(pexpect.TIMEOUT):
            stream.feed(console.read_nonblocking(4096, timeout=1))
    console.close(force=True)
    lines = ["".join(line[x].data for x in range(40)).strip() for line in screen.history.top] + screen.display
    fields = {"messages": [{"role": "user", "content": question}], "max_tokens": 200}
    reply = create(client, **fields).choices[0].message.content
    assert words(" ".join(lines)) == words(question + " " + reply), "\n".join(lines)
    assert len(lines) > 3 * 8


def test_keys_and_flags(closed, client):
    terminal = Terminal(
        closed, "--api-key", "other-key", "--principle", PRINCIPLE, "--alignment-ratio", "3", "--max-tokens", "24",
        "--temperature", "0",
    )  # fmt: skip
    assert "smollm2 at " in terminal.until(r"\n>$")
    text = create(client, {"principle": PRINCIPLE, "alignment_ratio": 3}).choices[0].message.content
    assert words(terminal.ask(QUESTION)) == words(QUESTION + text)
    terminal.type("\x1b[A")  # the up arrow recalls the question
    terminal.until(re.escape(QUESTION))
    terminal.process.close(force=True)
    environment = {**os.environ, "LINALIGN_API_KEY": "other-key"}
    for env, status in ((environment, 0), (os.environ, 1)):
        done = subprocess.run([*COMMAND, closed], input="/quit\n", env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == status
        assert ("an API key is needed" in done.stderr) == bool(status)


def test_errors_are_shown_and_the_chat_continues(start_chat):
    terminal = start_chat("--model", "smollm2:nobody")
    assert "does not exist" in terminal.ask("Hello")
    assert re.search("Unknown command /ratoi.*/ratio NUMBER", terminal.ask("/ratoi 3"), re.DOTALL)
    for wrong in ("x", "nan", "inf", "21"):
        assert f"{wrong} is not a number from -10 to 20" in terminal.ask(f"/ratio {wrong}")
    assert "/compare TEXT" in terminal.ask("/help")
    terminal.type("/quit\n")
    assert terminal.ends() == 0


def test_without_a_server_there_is_a_clear_error():
    done = subprocess.run([*COMMAND, f"http://127.0.0.1:{free_port()}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "`linalign serve` starts a server" in done.stderr
    for args in (["http://h:abc"], ["--temperature", "9"], ["--api-key", "schlüssel"]):
        done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.startswith("linalign chat: ")
        assert "Traceback" not in done.stderr


def test_replies_can_not_control_the_terminal():
    console = Console(record=True, width=60, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(shown("one \x1b]0;title\x07\x1b[2J two\u202e\x9b31m"))
    console.print(shown("&lt;three&gt; &#x202e;&#27;[31m&NewLine;&rlm; [four](http://a&#x9b;31m) `&#8238;`"))
    console.print(shown("5&#82&#8238;38; km&#x2&#x202e;02e; &rl&rlm;m; 6&nbsp;km 7\u00a0km"))
    text = console.export_text()
    assert words(text) == "one 0 title 2J two31m three 31m four 5 82 38 km x2 02e rl m 6 km 7 km"
    console.print(shown("Use the <div> tag, a List<int>.\n\n<p>This.</p>"))
    assert words(console.export_text()) == "Use the div tag a List int p This p"
    assert not [mark for mark in text if not mark.isprintable() and mark not in "\n\xa0"]


class Hostile(http.server.BaseHTTPRequestHandler):
    """A server that puts control sequences into all its texts: cursor, window title, colours."""

    EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[bold red]evil"

    def do_GET(self):
        self.answer(200, {"data": [{"id": self.EVIL}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(500, {"error": {"message": self.EVIL}})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("args", "typed"),
    [(["chat"], "Hello\n/quit\n"), (["bench", "--requests", "1", "--warmup", "0"], "")],
    ids=["chat", "bench"],
)
def test_a_hostile_server_does_not_reach_the_terminal(args, typed):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [*COMMAND[:-1], *args, f"http://127.0.0.1:{server.server_port}"]
        result = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60, check=False)
        server.shutdown()
    shown = result.stdout + result.stderr
    assert "evil" in shown
    assert "[bold red]" in shown
    assert not set(shown) & set("\x1b\x07\x9b\u202e")
