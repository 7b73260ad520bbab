"""OpenAI's objects of /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from linalign import Output, Prompt, Usage
from linalign.server.deltas import Delta, Parser, message_of
from linalign.server.engine_client import EngineClient
from linalign.server.exchange import Applied
from linalign.server.protocol.chat_request import ChatCompletionRequest
from linalign.server.replies.events import DONE, FAILURES, Event, failure
from linalign.server.replies.objects import logprob_object, token_counts, trace_object, usage_object
from linalign.server.replies.submission import Replies

PATH = "/v1/chat/completions"


class ChatCompletion:
    """Creates the reply of one chat completion: `whole` for a single object, `events` for a stream."""

    def __init__(
        self,
        engine: EngineClient,
        body: ChatCompletionRequest,
        fingerprint: str,
        prompt: Prompt,
        new_parser: Callable[[], Parser],
        applied: Applied | None,
    ) -> None:
        """new_parser: Creates the parser of one choice. applied: What the request is aligned with."""
        self._body, self._applied = body, applied
        self._new_parser = new_parser
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
        usage = usage_object([output.usage for output in outputs if output.usage], self._applied)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _choice(self, outputs: Sequence[Output]) -> dict[str, Any]:
        last, parser = outputs[-1], self._new_parser()
        deltas = parser.feed("".join(output.text for output in outputs)) + parser.finish()
        return {
            "index": last.choice,
            "message": self._named(message_of(deltas)),
            "finish_reason": self._finish_reason(last, any("tool_calls" in delta for delta in deltas)),
            "logprobs": self._logprobs(outputs),
            **self._trace(outputs),
        }

    async def events(self, replies: Replies, include_usage: bool, continuous: bool) -> AsyncIterator[Event]:
        parsers = [self._new_parser() for _ in range(replies.n)]
        calls = [False] * replies.n
        usages: list[Usage] = []
        num_drawn = 0

        def chunk(index: int, delta: Delta, reason: str | None = None, output: Output | None = None) -> Event:
            outputs = [output] if output else []
            logprobs = self._logprobs(outputs)
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
            choice |= self._trace(outputs)
            usage: dict[str, Any] = {"usage": None} if include_usage else {}
            if continuous:
                usage = {"usage": token_counts(self._num_prompt_tokens, num_drawn)}
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
                    yield chunk(index, self._named(delta), output=None if number else output)
                if output.finish_reason:
                    yield chunk(index, {}, self._finish_reason(output, calls[index]))
                if output.usage:
                    usages.append(output.usage)
            if include_usage:
                yield self._event(choices=[], usage=usage_object(usages, self._applied))
            yield DONE
        except FAILURES as error:
            yield failure(error, PATH)
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
        return {"alignment": [trace_object(report, self._token_bytes) for report in reports]}

    def _named(self, delta: Delta) -> Delta:
        """A delta or message under all the names that clients know."""
        if "reasoning_content" in delta:
            delta = {**delta, "reasoning": delta["reasoning_content"]}
        if self._body.functions and "tool_calls" in delta:
            (call,) = delta.pop("tool_calls")
            delta["function_call"] = call["function"]
        return delta

    def _finish_reason(self, last: Output, has_calls: bool) -> str | None:
        if has_calls and last.finish_reason == "stop":
            return "function_call" if self._body.functions else "tool_calls"
        return last.finish_reason
