"""Runs work on requests in threads, so that long work does not delay short requests."""

import asyncio
import contextvars
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from starlette.requests import Request

from linalign.server.state import state_of

LONG = 1 << 16  # bytes of a body
P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(request: Request, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """The result of the call. Requests with long bodies take turns in one thread, `ServerState.long_bodies`."""
    pool = state_of(request).long_bodies if len(await request.body()) > LONG else None
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(pool, partial(context.run, call, *args, **named))
