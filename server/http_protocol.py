"""Uvicorn's HTTP/1.1 over httptools, with a limit for headers, which httptools itself collects without end."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10
REFUSAL = (
    b'{"error":{"message":"the headers are too long","type":"invalid_request_error","param":null,'
    b'"code":"headers_too_large"}}'
)
RESPONSE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(REFUSAL), REFUSAL)
)


class BoundedHeaders(HttpToolsProtocol):
    """A connection whose request line and headers go on beyond MAX_HEADER_BYTES is closed with a 431."""

    _num_header_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._num_header_bytes += len(data)
        super().data_received(data)
        if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.transport.write(RESPONSE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._num_header_bytes = -(1 << 62)  # what comes now is a body, which has a limit of its own
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._num_header_bytes = 0
        super().on_message_complete()
