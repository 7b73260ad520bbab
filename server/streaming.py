"""From the engine's thread to the event loop, and from outputs to OpenAI's objects."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import JSONServerSentEvent, ServerSentEvent

from alignment_core import Engine, EngineDead, Output, Prompt, SamplingParams, Usage


class Replies:
    """A request on its way: iterate over its outputs, and `abort` when nobody listens any more.

    Submits at once. Raises InvalidRequest, EngineDead.
    """

    def __init__(self, engine: Engine, prompt: Prompt, params: SamplingParams) -> None:
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Output] = asyncio.Queue()

        def on_output(output: Output) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, output)

        self._engine = engine
        self._request_id = engine.submit(prompt, params, on_output)

    async def __aiter__(self) -> AsyncIterator[Output]:
        output: Output | None = None
        while output is None or not output.finish_reason:
            output = await self._queue.get()
            if output.finish_reason == "error":
                raise EngineDead("the engine failed during this request")
            yield output

    def abort(self) -> None:
        self._engine.abort(self._request_id)


class Completion:
    """The fields that all objects of one chat completion have in common."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, last: Output) -> dict[str, Any]:
        assert last.usage is not None
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": last.finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage_object(last.usage)}

    async def events(self, replies: Replies, include_usage: bool) -> AsyncIterator[ServerSentEvent]:
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for output in replies:
                if output.text:
                    yield self._chunk({"content": output.text})
                if output.finish_reason:
                    yield self._chunk({}, output.finish_reason)
                    if include_usage and output.usage is not None:
                        yield self._event(choices=[], usage=usage_object(output.usage))
            yield ServerSentEvent(data="[DONE]")
        except EngineDead as error:
            message = {"message": str(error), "type": "server_error", "param": None, "code": "engine_dead"}
            yield JSONServerSentEvent({"error": message})
        finally:
            replies.abort()

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> ServerSentEvent:
        return self._event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}])

    def _event(self, **fields: Any) -> ServerSentEvent:
        return JSONServerSentEvent({**self._head, "object": "chat.completion.chunk", **fields})


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage counts the user's view once; alignment_details tell the extra work."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "alignment_details": {
            "branches": usage.branches,
            "branch_tokens_computed": usage.branch_tokens_computed,
            "prefix_cached_tokens": usage.prefix_cached_tokens,
        },
    }
