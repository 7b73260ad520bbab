"""How a server ends: in order, with "abort" for replies that take too long, or at once when its engine is dead."""

import asyncio
import faulthandler
import logging
import os
import socket
import threading
import time
from types import FrameType

import uvicorn

from linalign import Engine, EngineDead

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds for a step, after which the engine is taken for dead
LOCKED = 3  # times that for an event loop that does not turn: a machine may stall
TURNS = 10  # of uvicorn's own loop, a second
AT_FIRST = 300.0  # as long as nobody knows how long a step takes here
USUAL = 10  # a step may take so many times as long as the longest before it, on machines where steps take seconds
LAST_WORDS = 10  # seconds for clients to be told that their replies end
FAREWELL = 1.0  # where the process itself is lost


def patience(longest: float) -> float:
    """Seconds for a step. longest: that the longest before it has taken; 0 where none is known."""
    return max(PATIENCE, USUAL * longest) if longest else AT_FIRST


class Server(uvicorn.Server):
    """timeout: seconds that running requests get once the server is asked to stop.

    It is its own watchdog. An engine that has died ends the server in order; one whose step does not come back, and an
    event loop that does not turn, end the process with status 1 and every thread's stack on stderr, so that whatever
    started it can start it again.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, timeout: float) -> None:
        super().__init__(config)
        self._engine, self._timeout = engine, timeout
        self._step: float | None = None  # when the one at hand has begun
        self._num_turns = 0  # of the event loop, since then

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn calls it TURNS times a second."""
        faulthandler.dump_traceback_later(LOCKED * self._patience, exit=True)  # unless the next turn puts it off
        began, _ = self._engine.pace
        # Turns of this loop are counted, not seconds: a process that was stopped meanwhile does not hang.
        self._num_turns = self._num_turns + 1 if began is not None and began == self._step else 0
        self._step = began
        if self._num_turns > self._patience * TURNS:
            await self._give_up()
        return await super().on_tick(counter) or not self._engine.alive

    @property
    def _patience(self) -> float:
        _, longest = self._engine.pace
        return patience(longest)

    @property
    def _has_replies(self) -> bool:
        """Whether there are any that are worth waiting for."""
        return self._engine.alive and not self._engine.idle and not self.force_exit

    async def _give_up(self) -> None:
        error = EngineDead(f"a step has not come back for {self._patience:.0f} s")
        log.critical("%s: the process ends", error)
        self._engine.give_up(error)
        await asyncio.sleep(FAREWELL)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)  # nothing waits for the thread that hangs

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets replies end, the second does not."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Until the replies have ended, whoever asks anew is told with a 503 to ask elsewhere."""
        last = self._timeout + self._patience + 2 * LAST_WORDS
        faulthandler.dump_traceback_later(last, exit=True)  # an engine that hangs now has nobody else to notice
        self._engine.drain()
        deadline = time.monotonic() + self._timeout
        while self._has_replies and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self._has_replies:
            threading.Thread(target=self._engine.stop, name="stop").start()  # it waits for the step at hand
        await super().shutdown(sockets)
        faulthandler.cancel_dump_traceback_later()
