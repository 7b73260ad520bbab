"""From the engine's thread to the event loop, and from outputs to OpenAI's objects."""

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.types import Message

from linalign import EngineDead, InvalidRequest, Output, Prompt, RequestFailed, SamplingParams, Usage
from linalign.alignment_core.output import IMPOSSIBLE, TokenLogprob, terminal_output
from linalign.server.engine_client import EngineClient
from linalign.server.exchange import CODES, exchange_of
from linalign.server.protocol.chat_request import ChatCompletionRequest
from linalign.server.protocol.generation import GenerationRequest
from linalign.server.tool_calls import Delta, ReplyParser, message_of
from linalign.server.tracing import Generation

log = logging.getLogger(__name__)

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole reply, or its events", "content": {"text/event-stream": {}}}
}


class Replies:
    """A request on its way: iterate over the outputs of its choices, and `abort` when nobody listens any more.

    Raises EngineDead, RequestFailed, and InvalidRequest for what turns out on the way.
    """

    def __init__(self, engine: EngineClient, n: int) -> None:
        self.n = self._num_left = n
        self._engine = engine
        self._queue: asyncio.Queue[Output] = asyncio.Queue()
        self._request_id: int | None = None

    @classmethod
    async def of(
        cls, request: Request, body: GenerationRequest, prompts: Sequence[Prompt], params: SamplingParams
    ) -> list["Replies"]:
        """Submit all prompts of a request, or none. Raises InvalidRequest, EngineDead, EngineBusy, KeyBusy."""
        exchange, n, replies = exchange_of(request.scope), body.n or 1, list[Replies]()
        exchange.admit(n * len(prompts))
        try:
            for prompt in prompts:
                replies.append(await cls._submitted(request, body, prompt, params))
        except BaseException as error:
            exchange.charge = lambda _: None  # of a request that is refused
            num_told = len(replies) + isinstance(error, asyncio.CancelledError)  # they leave as they end
            exchange.leave(n * (len(prompts) - num_told))
            for one in replies:
                one.abort()
            raise
        for prompt in prompts:
            exchange.ask(prompt)
        return replies

    @classmethod
    async def _submitted(
        cls, request: Request, body: GenerationRequest, prompt: Prompt, params: SamplingParams
    ) -> "Replies":
        state, exchange, n = request.app.state, exchange_of(request.scope), body.n or 1
        loop, replies = asyncio.get_running_loop(), cls(state.engine, n)
        measure = state.measures.of(prompt, exchange.began)
        operation = "chat" if isinstance(body, ChatCompletionRequest) else "text_completion"
        span = Generation(state.tracer, operation, body.model, prompt, params, n)
        key = exchange.key if state.settings.separates_keys else None
        prompt = replace(prompt, salt=_salt(key, body.cache_salt))

        def on_output(output: Output) -> None:
            measure(output)
            loop.call_soon_threadsafe(take, output)

        def take(output: Output) -> None:
            exchange.take(output)
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
    def of_nothing(cls, engine: EngineClient, prompt: Prompt, n: int) -> "Replies":
        """For a request that asks for no token at all."""
        replies = cls(engine, n)
        for choice in range(n):
            replies._queue.put_nowait(terminal_output(prompt, choice, "length"))
        return replies

    async def __aiter__(self) -> AsyncIterator[Output]:
        left = self.n
        while left:
            output = await self._queue.get()
            if output.error is not None:
                if isinstance(output.error, RequestFailed):  # the engine's log has the stack, but not the client's id
                    log.error("The engine's request %s failed", self._request_id)
                raise output.error
            if output.finish_reason == "error":
                raise EngineDead("the engine failed during this request")
            left -= output.finish_reason is not None
            yield output

    def abort(self) -> None:
        if self._request_id is not None and self._num_left:
            self._engine.abort(self._request_id)


def _salt(key: bytes | None, cache_salt: str | None) -> bytes:
    """key: the hash of an API key whose prefixes are its own."""
    if key is None and cache_salt is None:
        return b""
    owner = b"anyone" if key is None else b"key" + key
    return hashlib.sha256(owner + (b"" if cache_salt is None else b"salt" + cache_salt.encode())).digest()


async def gather(replies: Sequence[Replies], request: Request) -> list[list[Output]] | None:
    """All outputs of several requests, or None if the client has gone meanwhile; nothing is left running."""

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
        await asyncio.gather(collecting, return_exceptions=True)  # asks for its exception


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Event(ServerSentEvent):
    """With OpenAI's line ends."""

    def __init__(self, data: Any, event: str | None = None) -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        super().__init__(text, event=event, sep="\n")


DONE = Event("[DONE]")
Failure = EngineDead | InvalidRequest | RequestFailed  # how replies end that can't go on
FAILURES = (EngineDead, InvalidRequest, RequestFailed)


def event_stream(events: AsyncIterator[Event], replies: Sequence[Replies]) -> EventSourceResponse:
    """A response that ends the replies when its client goes."""

    async def on_leave(_: Message) -> None:
        for one in replies:
            one.abort()

    return EventSourceResponse(events, sep="\n", client_close_handler_callable=on_leave)


class ChatCompletion:
    """OpenAI's objects of one chat completion."""

    def __init__(
        self,
        engine: EngineClient,
        body: ChatCompletionRequest,
        fingerprint: str,
        prompt: Prompt,
        parser: Callable[[], ReplyParser],
    ) -> None:
        """parser: makes one for each choice."""
        self._body = body
        self._parser = parser
        self._token_bytes = engine.token_bytes
        self._num_prompt_tokens = len(prompt.principled[0])
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, outputs: Sequence[Output], n: int) -> dict[str, Any]:
        choices = [self._choice([output for output in outputs if output.choice == index]) for index in range(n)]
        usage = usage_object([output.usage for output in outputs if output.usage])
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _choice(self, outputs: Sequence[Output]) -> dict[str, Any]:
        last, parser = outputs[-1], self._parser()
        deltas = parser.feed("".join(output.text for output in outputs)) + parser.finish()
        return {
            "index": last.choice,
            "message": message_of(deltas),
            "finish_reason": _finish_reason(last, any("tool_calls" in delta for delta in deltas)),
            "logprobs": self._logprobs(outputs),
            **self._trace(outputs),
        }

    async def events(self, replies: Replies, include_usage: bool, continuous: bool) -> AsyncIterator[Event]:
        parsers = [self._parser() for _ in range(replies.n)]
        calls = [False] * replies.n
        usages: list[Usage] = []
        num_drawn = 0

        def chunk(index: int, delta: Delta, reason: str | None = None, output: Output | None = None) -> Event:
            news = [output] if output else []
            logprobs = self._logprobs(news)
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            choice |= self._trace(news)
            usage: dict[str, Any] = {"usage": None} if include_usage else {}
            if continuous:
                usage = {"usage": _counts(self._num_prompt_tokens, num_drawn)}
            return self._event(choices=[choice], **usage)

        try:
            for index in range(replies.n):
                yield chunk(index, {"role": "assistant", "content": ""})
            async for output in replies:
                index, parser = output.choice, parsers[output.choice]
                num_drawn += len(output.token_ids)
                deltas = parser.feed(output.text) + (parser.finish() if output.finish_reason else [])
                for number, delta in enumerate(deltas or ([{}] if output.logprobs else [])):
                    calls[index] |= "tool_calls" in delta
                    yield chunk(index, delta, output=None if number else output)
                if output.finish_reason:
                    yield chunk(index, {}, _finish_reason(output, calls[index]))
                if output.usage:
                    usages.append(output.usage)
            if include_usage:
                yield self._event(choices=[], usage=usage_object(usages))
            yield DONE
        except FAILURES as error:
            yield failure(error)
        finally:
            replies.abort()

    def _event(self, **fields: Any) -> Event:
        return Event({**self._head, "object": "chat.completion.chunk", **fields})

    def _logprobs(self, outputs: Sequence[Output]) -> dict[str, Any] | None:
        reports = [report for output in outputs for report in output.logprobs]
        if not reports or not self._body.logprobs:
            return None
        return {"content": [logprob_object(report, self._token_bytes) for report in reports], "refusal": None}

    def _trace(self, outputs: Sequence[Output]) -> dict[str, Any]:
        if not self._body.alignment_trace:
            return {}
        reports = [report for output in outputs for report in output.logprobs]
        return {"alignment": [trace_of(report, self._token_bytes) for report in reports]}


def _finish_reason(last: Output, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and last.finish_reason == "stop" else last.finish_reason


def logprob_object(report: TokenLogprob, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """OpenAI's form of one token's log-probabilities."""

    def one(id: int, logprob: float) -> dict[str, Any]:
        content = token_bytes(id)
        return {
            "token": content.decode(errors="replace"),
            "logprob": max(logprob, IMPOSSIBLE),
            "bytes": list(content),
        }

    return {**one(report.token_id, report.logprob), "top_logprobs": [one(*pair) for pair in report.top]}


def trace_of(report: TokenLogprob, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """DESIGN section 6: what the policies made of a token; the best of each policy where log-probabilities are
    asked for. Without a base branch there is one policy only.
    """
    aligned, trace = logprob_object(report, token_bytes), report.trace
    told = {"token": aligned["token"], "bytes": aligned["bytes"], "logprob": aligned["logprob"]}
    if trace is None:
        nothing = {"base_logprob": None, "plausible_tokens": None, "kl": None}
        return {**told, "principled_logprob": aligned["logprob"], **nothing}
    principled, base = logprob_object(trace.principled, token_bytes), logprob_object(trace.base, token_bytes)
    told |= {"principled_logprob": principled["logprob"], "base_logprob": base["logprob"]}
    told |= {"plausible_tokens": trace.num_plausible, "kl": trace.kl}
    if report.top:
        policies = {"aligned": aligned, "principled": principled, "base": base}
        told["top"] = {name: policy["top_logprobs"] for name, policy in policies.items()}
    return told


def failure(error: Failure) -> Event:
    """The last event of a stream that can't go on."""
    told = {"message": str(error), "type": "server_error", "param": None}
    if isinstance(error, InvalidRequest):
        told |= {"type": "invalid_request_error", "param": error.param}
    code = CODES.get(type(error), CODES[type(None)])
    return Event({"error": {**told, "code": code}})


def usage_object(usages: Sequence[Usage]) -> dict[str, Any]:
    """Of all choices together. OpenAI's counts are the user's view, a prompt counted once; alignment_details tell
    the extra work.
    """
    return {
        **_counts(usages[0].prompt_tokens, sum(usage.completion_tokens for usage in usages)),
        # of the choice that ran first: the others find what it has computed
        "prompt_tokens_details": {"cached_tokens": min(usage.prompt_cached_tokens for usage in usages)},
        "alignment_details": {
            "branches": usages[0].branches,
            "branch_tokens_computed": sum(usage.branch_tokens_computed for usage in usages),
            "prefix_cached_tokens": sum(usage.prefix_cached_tokens for usage in usages),
        },
    }


def _counts(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
