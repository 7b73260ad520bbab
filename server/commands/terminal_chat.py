"""linalign chat: chats with the model of a server in a terminal, with a principle."""

import asyncio
import contextlib
import html
import json
import math
import re
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
from httpx_sse import aconnect_sse
from markdown_it import MarkdownIt
from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from linalign.alignment_core.request import MAX_RATIO, MIN_RATIO
from linalign.server.command_line import parse
from linalign.server.commands.terminal import printable
from linalign.server.settings import API_KEY, FIRST_MODEL, Arguments, client_key

with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - the arrow keys bring earlier lines back

ENTITY = re.compile(r"&#?\w+;")
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
HELP = """\
/principle TEXT   set the principle; without a text: no principle
/ratio NUMBER     set the ratio; without a number: the server's default
/compare TEXT     three replies side by side: plain, prompted, aligned
/history          show the conversation
/new              start a new conversation
/quit             quit (or Ctrl-D); Ctrl-C stops a reply"""


class ChatSettings(Arguments):
    """Chat with the model of a running server, with a principle. URL is any OpenAI-compatible server; principles and
    ratios need a linalign server.
    """

    EPILOG: ClassVar[str] = f"""
commands in the chat:
{textwrap.indent(HELP, "  ")}

examples:
  linalign chat
  linalign chat --principle "Encourage cycling." --alignment-ratio 4
  linalign chat http://127.0.0.1:8123 --model smollm2:teacher
  LINALIGN_API_KEY=key-1 linalign chat https://models.example.org

exit status:
  0  end of the input
  1  the server can't be reached, it returned an error, or an option has an
     invalid value
  2  unknown option
"""

    model_config = SettingsConfigDict(cli_prog_name="linalign chat")

    url: CliPositionalArg[str] = Field("http://127.0.0.1:8000", description="the server, without /v1")
    model: str | None = Field(None, title="NAME", description=FIRST_MODEL)
    api_key: str = Field(default_factory=client_key, title="KEY", description=API_KEY)
    principle: str = Field("", title="TEXT", description="a preference in plain words (default: none)")
    alignment_ratio: float | None = Field(
        None,
        ge=MIN_RATIO,
        le=MAX_RATIO,
        title="RATIO",
        description=f"from {MIN_RATIO:g} to {MAX_RATIO:g}, how strongly replies follow the principle (default: the "
        "server's)",
    )
    temperature: float | None = Field(
        None, ge=0, le=2, title="T", description="from 0, always the most likely token, to 2 (default: the server's)"
    )
    max_tokens: int | None = Field(
        None, ge=1, title="TOKENS", description="longest reply (default: up to the context limit)"
    )


class ErrorReply(Exception):
    """An error response of the server. The message is the server's."""


@dataclass(slots=True)
class Conversation:
    principle: str
    ratio: float | None
    messages: list[dict[str, str]] = field(default_factory=list)


def main(args: list[str]) -> None:
    console = Console(highlight=False)
    settings = parse(ChatSettings, args)
    try:
        with httpx.Client(base_url=settings.url, headers=_headers(settings)) as client:
            model = settings.model or _first_model(client)
    except (httpx.HTTPError, httpx.InvalidURL, ErrorReply, ValueError) as error:  # ValueError: no OpenAI-like server
        sys.exit(f"linalign chat: {printable(str(error))} (`linalign serve` starts a server)")
    console.print(f"{printable(model)} at {settings.url}. /help lists commands.", markup=False)
    Chat(settings, model, console).run()


def _headers(settings: ChatSettings) -> dict[str, str]:
    return {"Authorization": f"Bearer {settings.api_key}"}


def _first_model(client: httpx.Client) -> str:
    response = client.get("/v1/models")
    _raise_for_error(response)
    model: str = response.json()["data"][0]["id"]
    return model


class Chat:
    """One conversation after the other, until the input ends."""

    def __init__(self, settings: ChatSettings, model: str, console: Console) -> None:
        self._settings = settings
        self._model = model
        self._console = console
        self._conversation = Conversation(settings.principle, settings.alignment_ratio)
        self._commands: dict[str, Callable[[str], None]] = {
            "/principle": self._set_principle,
            "/ratio": self._set_ratio,
            "/compare": self._compare,
            "/history": self._show_history,
            "/new": self._start_new,
            "/help": lambda _: self._console.print(HELP, markup=False),
        }

    def run(self) -> None:
        while True:
            try:
                line = input("> ").strip()  # input, because readline must know the prompt
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            name, _, rest = line.partition(" ")
            if name == "/quit":
                return
            if not name.startswith("/"):
                self._send(line)
            elif name in self._commands:
                self._commands[name](rest.strip())
            else:
                self._console.print(f"Unknown command {name}.\n{HELP}", markup=False)

    def _set_principle(self, text: str) -> None:
        self._conversation.principle = text
        self._console.print(f"Principle: {text}" if text else "No principle.", markup=False)

    def _set_ratio(self, text: str) -> None:
        try:
            ratio = float(text) if text else None
        except ValueError:
            ratio = math.nan
        if ratio is not None and not MIN_RATIO <= ratio <= MAX_RATIO:
            self._console.print(f"{text} is not a number from {MIN_RATIO:g} to {MAX_RATIO:g}.", markup=False)
            return
        self._conversation.ratio = ratio
        self._console.print("Ratio: the server's default." if ratio is None else f"Ratio: {ratio:g}")

    def _show_history(self, _: str) -> None:
        for message in self._conversation.messages:
            self._console.print(f"[bold]{message['role']}[/bold]")
            self._console.print(
                shown(message["content"]) if message["role"] == "assistant" else message["content"], markup=False
            )

    def _start_new(self, _: str) -> None:
        self._conversation.messages.clear()
        self._console.print("A new conversation.")

    def _send(self, text: str) -> None:
        if not text:
            return
        messages = [*self._conversation.messages, {"role": "user", "content": text}]
        reply = Reply("", self._body(messages, self._conversation.ratio))
        self._show([reply], lambda: reply.rendered)
        if reply.text:
            self._conversation.messages = [*messages, {"role": "assistant", "content": reply.text}]

    def _compare(self, text: str) -> None:
        """Show three replies. They do not become part of the conversation."""
        if not text or not self._conversation.principle:
            self._console.print("/compare needs a text, and a principle that was set before.")
            return
        messages = [*self._conversation.messages, {"role": "user", "content": text}]
        ratio = self._conversation.ratio
        plain = self._body(messages, ratio)
        for name in ("principle", "alignment_ratio"):
            plain.pop(name, None)
        replies = [
            Reply("without the principle", plain),
            Reply("prompted, ratio 0", self._body(messages, 0)),
            Reply("aligned" if ratio is None else f"aligned, ratio {ratio:g}", self._body(messages, ratio)),
        ]

        def side_by_side() -> Table:
            grid = Table.grid(expand=True)
            for _ in replies:
                grid.add_column(ratio=1)
            grid.add_row(*(Panel(reply.rendered, title=reply.title) for reply in replies))
            return grid

        self._show(replies, side_by_side)

    def _body(self, messages: list[dict[str, str]], ratio: float | None) -> dict[str, Any]:
        settings, principle = self._settings, self._conversation.principle
        optional = {
            "principle": principle or None,
            "alignment_ratio": ratio if principle else None,
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        return {"model": self._model, "messages": messages, "stream": True, **given}

    def _show(self, replies: "list[Reply]", rendered: Callable[[], Any]) -> None:
        """Stream the replies simultaneously. Ctrl-C stops them; their text so far stays."""

        async def stream() -> None:
            settings = self._settings
            async with httpx.AsyncClient(base_url=settings.url, headers=_headers(settings), timeout=600) as client:
                await asyncio.gather(*(reply.stream(client) for reply in replies))

        with (
            Live(get_renderable=lambda: Tail(rendered()), console=self._console, transient=True),
            contextlib.suppress(KeyboardInterrupt),
        ):
            asyncio.run(stream())
        self._console.print(rendered())


@dataclass(frozen=True, slots=True)
class Tail:
    """The last lines of an output, as many as the terminal has."""

    whole: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.whole, options, pad=False)
        for line in lines[-max(console.height - 2, 1) :]:
            yield from line
            yield Segment.line()


@dataclass(slots=True)
class Reply:
    """A reply that is being streamed. error: Why it is incomplete, or ""."""

    title: str
    body: dict[str, Any]
    reasoning: str = ""
    text: str = ""
    error: str = ""

    @property
    def rendered(self) -> Group:
        parts: list[Markdown | Text] = [shown(self.text)]
        if self.reasoning:
            parts.insert(0, Text(printable(self.reasoning), style="dim"))
        if self.error:
            parts.append(Text(printable(self.error), style="red"))
        return Group(*parts)

    async def stream(self, client: httpx.AsyncClient) -> None:
        try:
            async for delta in deltas(client, self.body):
                self.reasoning += delta.get("reasoning_content") or ""
                self.text += delta.get("content") or ""
        except (httpx.HTTPError, ErrorReply) as error:
            self.error = str(error) or repr(error)


def shown(text: str) -> Markdown:
    """Rendered Markdown, in which HTML is shown as text."""
    text = ENTITY.sub(lambda entity: entity[0] if _is_printable(html.unescape(entity[0])) else " ", printable(text))
    markdown = Markdown(text)
    markdown.parsed = PARSER.parse(text)
    return markdown


def _is_printable(text: str) -> bool:
    return printable(text) == text


async def deltas(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The deltas of a streamed chat completion as they arrive. Raises httpx.HTTPError, ErrorReply."""
    async with aconnect_sse(client, "POST", "/v1/chat/completions", json=body) as source:
        if source.response.is_error:
            await source.response.aread()
            _raise_for_error(source.response)
        async for event in source.aiter_sse():
            if event.data == "[DONE]":
                return
            chunk = json.loads(event.data)
            if "error" in chunk:
                raise ErrorReply(chunk["error"]["message"])
            for choice in chunk["choices"]:
                yield choice["delta"]
    raise ErrorReply("the connection was closed before the end of the reply")


def _raise_for_error(response: httpx.Response) -> None:
    """Raises ErrorReply for an error response, with the message of OpenAI's error object if there is one."""
    if response.is_error:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            raise ErrorReply(response.json()["error"]["message"])
        raise ErrorReply(f"the server answered {response.status_code}")
