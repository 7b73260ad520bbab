"""Uvicorn's HTTP/1.1 over httptools, with bounds for what a client may make a connection hold, and for how long."""

import asyncio
import socket

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10
PATIENCE = 60.0  # seconds
REFUSAL = (
    b'{"error":{"message":"the headers are too long","type":"invalid_request_error","param":null,'
    b'"code":"headers_too_large"}}'
)
RESPONSE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(REFUSAL), REFUSAL)
)


class BoundedProtocol(HttpToolsProtocol):
    """A connection is closed with a 431 whose request line and headers go on beyond MAX_HEADER_BYTES, as httptools
    itself collects them without end. It is cut off when its client says nothing for PATIENCE where a request should
    begin or go on, or when what waits to be sent to it stays above the transport's mark for as long.
    """

    _num_header_bytes = 0
    _awaits_client = True
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # what waits to be sent when a connection is closed, too
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(PATIENCE * 1000))
        self._set_reading_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_header_bytes += len(data)
        super().data_received(data)
        if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.transport.write(RESPONSE)
            self.transport.close()
        self._set_reading_timer()

    def on_message_begin(self) -> None:
        self._awaits_client = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._num_header_bytes = -(1 << 62)  # what comes now is a body, which has a limit of its own
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._num_header_bytes = 0
        self._awaits_client = False  # between requests uvicorn has a timer of its own
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._writing = self.loop.call_later(PATIENCE, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
        super().resume_writing()

    def _set_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._reading = self.loop.call_later(PATIENCE, self._on_silence) if self._awaits_client else None

    def _on_silence(self) -> None:
        if self.flow.read_paused:  # it is us who don't listen
            self._set_reading_timer()
        else:
            self.transport.abort()
