"""How a server ends: in order, with "abort" for replies that take too long, or at once when its engine is dead."""

import asyncio
import faulthandler
import logging
import os
import socket
import threading
from types import FrameType

import uvicorn

from alignment_core import Engine, EngineDead

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds without progress after which a process is taken for dead
AT_FIRST = 300.0  # as long as nobody knows how long a step takes here
USUAL = 10  # a step may take so many times as long as the longest before it, on machines where steps take seconds
LAST_WORDS = 1.0  # seconds for errors to reach their clients


class Server(uvicorn.Server):
    """timeout: seconds that running requests get once the server is asked to stop.

    It is its own watchdog. An engine that has died ends the server in order; one whose step does not come back, and an
    event loop that does not turn, end the process with status 1 and every thread's stack on stderr, so that whatever
    started it can start it again.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, timeout: float) -> None:
        super().__init__(config)
        self._engine, self._timeout = engine, timeout

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn calls it ten times a second."""
        if counter % 10 == 0:
            faulthandler.dump_traceback_later(self._patience, exit=True)  # unless it is put off a second later
        running, _ = self._engine.pace
        if running > self._patience:
            await self._give_up(running)
        return await super().on_tick(counter) or not self._engine.alive

    @property
    def _patience(self) -> float:
        _, longest = self._engine.pace
        return max(PATIENCE, USUAL * longest) if longest else AT_FIRST

    async def _give_up(self, seconds: float) -> None:
        error = EngineDead(f"a step has not come back for {seconds:.0f} s")
        log.critical("%s: the process ends", error)
        self._engine.give_up(error)
        await asyncio.sleep(LAST_WORDS)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)  # nothing waits for the thread that hangs

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets replies end, the second does not."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        faulthandler.cancel_dump_traceback_later()
        stop = threading.Thread(target=self._engine.stop, name="stop")  # which waits for the step at hand
        timer = asyncio.get_running_loop().call_later(self._timeout, stop.start)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
