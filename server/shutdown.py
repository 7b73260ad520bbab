"""The end of a server: in order, with "abort" for replies that take too long, or at once if the engine is dead."""

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

STEP_TIMEOUT = 10.0  # seconds; after a longer step the engine counts as dead
EVENT_LOOP_FACTOR = 3  # × the timeout of a step, for an event loop that hangs: a machine may stall
TICKS_PER_SECOND = 10  # of uvicorn's main loop
FIRST_STEP_TIMEOUT = 300.0  # seconds, while the usual length of a step is unknown
LONGEST_STEP_FACTOR = 10  # × the longest step so far, for machines on which steps take seconds
CLOSE_TIMEOUT = 10  # seconds to send clients the end of their replies
ERROR_DELIVERY_TIME = 1.0  # seconds to send errors before the process exits


def step_timeout(longest: float) -> float:
    """Seconds after which a step counts as hung. longest: Seconds of the longest step so far; 0 if there is none."""
    return max(STEP_TIMEOUT, LONGEST_STEP_FACTOR * longest) if longest else FIRST_STEP_TIMEOUT


class Server(uvicorn.Server):
    """A uvicorn server that watches its engine.

    A dead engine ends the server in order. A hanging step, or a hanging event loop, ends the process with status 1 and
    the stack of every thread on stderr, so that a supervisor can restart the server.

    timeout: Seconds that running requests get after a signal to stop.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, timeout: float) -> None:
        super().__init__(config)
        self._engine, self._timeout = engine, timeout
        self._step: float | None = None  # time.monotonic() at the beginning of the current step
        self._num_turns = 0  # ticks of the event loop since that step began

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn TICKS_PER_SECOND times a second."""
        # The next tick resets this timer.
        faulthandler.dump_traceback_later(EVENT_LOOP_FACTOR * self._step_timeout, exit=True)
        began, _ = self._engine.pace
        # Count ticks, not seconds: a process that was stopped (SIGSTOP) does not hang.
        self._num_turns = self._num_turns + 1 if began is not None and began == self._step else 0
        self._step = began
        if self._num_turns > self._step_timeout * TICKS_PER_SECOND:
            await self._give_up()
        return await super().on_tick(counter) or not self._engine.alive

    @property
    def _step_timeout(self) -> float:
        _, longest = self._engine.pace
        return step_timeout(longest)

    @property
    def _has_replies(self) -> bool:
        """Whether there are unfinished replies that the shutdown should wait for."""
        return self._engine.alive and not self._engine.idle and not self.force_exit

    async def _give_up(self) -> None:
        error = EngineDead(f"a step has not finished for {self._step_timeout:.0f} s")
        log.critical("%s: the process ends", error)
        self._engine.give_up(error)
        await asyncio.sleep(ERROR_DELIVERY_TIME)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)  # do not wait for the hanging thread

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """After the first signal replies may finish; the second ends the server at once."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running replies. Until they have ended, new requests get a 503."""
        last = self._timeout + self._step_timeout + 2 * CLOSE_TIMEOUT
        faulthandler.dump_traceback_later(last, exit=True)  # nothing else notices an engine that hangs from here on
        self._engine.drain()
        deadline = time.monotonic() + self._timeout
        while self._has_replies and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self._has_replies:
            threading.Thread(target=self._engine.stop, name="stop").start()  # `stop` waits for the current step
        await super().shutdown(sockets)
        faulthandler.cancel_dump_traceback_later()
