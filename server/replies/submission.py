"""Submits requests to the engine and brings their outputs from its thread to the event loop."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from starlette.requests import Request

from linalign import EngineDead, Output, Prompt, RequestFailed, SamplingParams
from linalign.alignment_core.output import terminal_output
from linalign.server.engine_client import EngineClient
from linalign.server.exchange import exchange_of
from linalign.server.protocol.chat_request import ChatCompletionRequest
from linalign.server.protocol.generation import GenerationRequest
from linalign.server.state import state_of
from linalign.server.tracing import Generation

log = logging.getLogger(__name__)


class Replies:
    """A submitted prompt. Iterate over the outputs of its choices; call `abort` if the client disconnects.

    Iteration raises EngineDead, RequestFailed, and InvalidRequest for errors after submission.
    """

    def __init__(self, engine: EngineClient, n: int) -> None:
        self.n = self._num_left = n
        self._engine = engine
        self._queue: asyncio.Queue[Output] = asyncio.Queue()
        self._request_id: int | None = None

    @classmethod
    async def submit(
        cls, request: Request, body: GenerationRequest, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list["Replies"]:
        """Submit all prompts of a request, or none. Raises InvalidRequest, EngineDead, EngineBusy, KeyBusy."""
        exchange, n, replies = exchange_of(request.scope), body.n or 1, list[Replies]()
        exchange.admit(n * len(prompts))
        try:
            for prompt in prompts:
                replies.append(await cls._submit_one(request, body, prompt, params))
        except BaseException as error:
            exchange.charge = lambda _: None  # a refused request costs no tokens
            # The choices of submitted prompts leave when they end.
            num_submitted = len(replies) + isinstance(error, asyncio.CancelledError)
            exchange.leave(n * (len(prompts) - num_submitted))
            for one in replies:
                one.abort()
            raise
        for prompt in prompts:
            exchange.count_prompt(prompt)
        return replies

    @classmethod
    async def _submit_one(
        cls, request: Request, body: GenerationRequest, prompt: Prompt, params: SamplingParams
    ) -> "Replies":
        state, exchange, n = state_of(request), exchange_of(request.scope), body.n or 1
        loop, replies = asyncio.get_running_loop(), cls(state.engine, n)
        measure = state.measures.listener(prompt, exchange.began)
        operation = "chat" if isinstance(body, ChatCompletionRequest) else "text_completion"
        span = Generation(state.tracer, operation, body.model or "", prompt, params, n)
        key = exchange.key if state.settings.separates_keys else None
        prompt = replace(prompt, salt=_salt(key, body.cache_salt))

        def on_output(output: Output) -> None:
            measure(output)
            loop.call_soon_threadsafe(take, output)

        def take(output: Output) -> None:
            exchange.count_output(output)
            span.take(output)
            replies._num_left -= output.finish_reason is not None
            replies._queue.put_nowait(output)

        try:
            replies._request_id = await state.engine.submit(prompt, params, on_output, n)
        except Exception as error:
            span.fail(error)
            raise
        return replies

    @classmethod
    def empty(cls, engine: EngineClient, prompt: Prompt, n: int) -> "Replies":
        """Replies without tokens, for a prompt that the engine need not see."""
        replies = cls(engine, n)
        for choice in range(n):
            replies._queue.put_nowait(terminal_output(prompt, choice, "length"))
        return replies

    async def __aiter__(self) -> AsyncIterator[Output]:
        num_unfinished = self.n
        while num_unfinished:
            output = await self._queue.get()
            if output.error is not None:
                if isinstance(output.error, RequestFailed):  # the engine's log has the stack, but not the request id
                    log.error("The engine's request %s failed", self._request_id)
                raise output.error
            if output.finish_reason == "error":
                raise EngineDead("the engine failed during this request")
            num_unfinished -= output.finish_reason is not None
            yield output

    def abort(self) -> None:
        if self._request_id is not None and self._num_left:
            self._engine.abort(self._request_id)


def _salt(key: bytes | None, cache_salt: str | None) -> bytes:
    """The salt of a prompt. key: The hash of the API key, if keys do not share prefixes."""
    if key is None and cache_salt is None:
        return b""
    owner = b"anyone" if key is None else b"key" + key
    return hashlib.sha256(owner + (b"" if cache_salt is None else b"salt" + cache_salt.encode())).digest()


async def gather(replies: Sequence[Replies], request: Request) -> list[list[Output]] | None:
    """All outputs of several prompts, or None if the client disconnects. All replies have then ended."""

    async def outputs_of(one: Replies) -> list[Output]:
        return [output async for output in one]

    collecting = asyncio.gather(*map(outputs_of, replies))
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else None
    finally:
        for one in replies:
            one.abort()
        leaving.cancel()
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)  # retrieves its exception


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
