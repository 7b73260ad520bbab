"""Uvicorn's HTTP/1.1 over httptools, with bounds for the memory and the time that a client can take."""

import asyncio
import select
import socket
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEADER_BYTES = 64 << 10
MAX_PIPELINED = 16  # requests of a connection that wait behind the current one
SLICE = 4 << 10  # bytes parsed in one turn of the event loop; each byte may be a chunk of a body
IDLE_TIMEOUT = 60.0  # seconds


def _response(status: bytes, message: bytes, code: bytes) -> bytes:
    """A complete response in OpenAI's shape, after which the connection is closed."""
    content = b'{"error":{"message":"%s","type":"invalid_request_error","param":null,"code":"%s"}}' % (message, code)
    head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(content)) + content


TOO_LONG = _response(b"431 Request Header Fields Too Large", b"the headers are too long", b"headers_too_large")
MALFORMED = _response(b"400 Bad Request", b"this is no valid HTTP request", b"invalid_http")


class BoundedProtocol(HttpToolsProtocol):
    """One connection, with these bounds:

    - More than MAX_HEADER_BYTES in request line and headers, or in trailers: the connection is closed with a 431.
      httptools itself has no bound.
    - More than MAX_PIPELINED waiting requests: the connection is aborted.
    - A client that sends nothing for IDLE_TIMEOUT when a request should begin or continue: aborted.
    - A client that does not read: aborted when the write buffer has been above the transport's high-water mark for
      IDLE_TIMEOUT.

    If the connection is lost, the request that is being answered is notified, also if others wait behind it.
    """

    _num_header_bytes = 0  # since the last chunk of a body
    _num_parsed = 0  # bytes of the first of _unread
    _parses_again = False  # whether the request has a header Upgrade
    _is_last = False  # whether nothing is read after the latest request
    _answered: RequestResponseCycle | None = None
    _awaits_client = _awaits_headers = True
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unread = deque[bytes]()
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # what waits to be sent when a connection is closed, too
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(IDLE_TIMEOUT * 1000))
        self._set_reading_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        self.pipeline.clear()
        self._unread.clear()
        if self._answered is not None and not self._answered.response_complete:  # uvicorn notifies the latest one
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_last:
            return
        self._unread.append(data)
        if len(self._unread) == 1:
            self._parse()

    def _parse(self) -> None:
        """Parse one slice of the received bytes. The next slice waits for the next turn of the event loop."""
        if not self._unread:  # the connection is lost
            return
        self._take(self._next_slice())
        if self._unread:
            self.transport.pause_reading()
            self.loop.call_soon(self._parse)
        elif not (self.flow.read_paused or self.transport.is_closing()):
            self.transport.resume_reading()

    def eof_received(self) -> None:
        """Parse what the client has sent before it closed its side. Uvicorn then closes the connection."""
        while self._unread:
            self._take(self._next_slice())
        super().eof_received()

    def _next_slice(self) -> bytes:
        piece = self._unread[0][self._num_parsed : self._num_parsed + SLICE]
        self._num_parsed += len(piece)
        if self._num_parsed == len(self._unread[0]):
            self._unread.popleft()
            self._num_parsed = 0
        return piece

    def _take(self, data: bytes) -> None:
        self._num_header_bytes += len(data)
        try:
            self._unset_keepalive_if_required()
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self._is_last:
                self._parse_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")
        if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            if self.cycle is None or (self._awaits_headers and self.cycle.response_complete):
                self.transport.write(TOO_LONG)
                self.transport.close()
            else:
                self.transport.abort()  # a response is under way: no other can be sent
        if self.transport.is_closing() or self._is_last:
            self._unread.clear()
        self._set_reading_timer()

    def send_400_response(self, msg: str) -> None:
        """Send a 400 unless a response is under way, or none can be sent. The connection ends in any case."""
        del msg
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(MALFORMED)
            self.transport.close()
        else:
            self.transport.abort()

    def _parse_without_upgrade(self, rest: bytes) -> None:
        """Parse the request again without its header Upgrade. rest: The received bytes after the headers.

        The server ignores the header, which Java's HTTP client sends with every request (h2c), but httptools skips the
        body of a request that has it.
        """
        headers = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._take(line + b"".join(headers) + b"\r\n" + rest)

    def on_message_begin(self) -> None:
        self._awaits_client = self._awaits_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        is_upgrade, is_connect = self.parser.should_upgrade(), self.parser.get_method() == b"CONNECT"
        self._parses_again = is_upgrade and not is_connect
        if self._parses_again:
            return
        self._num_header_bytes = 0
        self._awaits_headers = False
        super().on_headers_complete()
        if is_connect:  # the bytes after the headers are no request
            self._is_last, self.cycle.keep_alive = True, False
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
            raise ConnectionAbortedError  # stops the parser
        if self.pipeline:
            self._look_for_end()

    def on_body(self, body: bytes) -> None:
        self._num_header_bytes = 0  # a body has its own limit
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._parses_again:
            return
        self._num_header_bytes = 0
        self._awaits_client = False  # between requests uvicorn's own timer runs
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        self._writing = self.loop.call_later(IDLE_TIMEOUT, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
        super().resume_writing()

    def _look_for_end(self) -> None:
        """Abort if the client has gone. While requests wait behind another, nothing is read that would show it."""
        if self.flow.read_paused and not self.transport.is_closing():
            poll = select.poll()
            poll.register(self.transport.get_extra_info("socket").fileno(), getattr(select, "POLLRDHUP", 0))
            if poll.poll(0):
                self.transport.abort()
            else:
                self.loop.call_later(1.0, self._look_for_end)

    def _set_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._reading = self.loop.call_later(IDLE_TIMEOUT, self._on_silence) if self._awaits_client else None

    def _on_silence(self) -> None:
        if self.flow.read_paused:  # the server does not read, so the client is not silent
            self._set_reading_timer()
        else:
            self.transport.abort()
