"""A server that lets replies end, and tells those that take too long "abort" instead of cutting them off."""

import asyncio
import socket
import threading

import uvicorn

from alignment_core import Engine


class Server(uvicorn.Server):
    """timeout: seconds that running requests get once the server is asked to stop."""

    def __init__(self, config: uvicorn.Config, engine: Engine, timeout: float) -> None:
        super().__init__(config)
        self._engine, self._timeout = engine, timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stop = threading.Thread(target=self._engine.stop, name="stop")  # which waits for the step at hand
        timer = asyncio.get_running_loop().call_later(self._timeout, stop.start)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
