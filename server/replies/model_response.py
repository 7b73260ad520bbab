"""OpenAI's objects and events of /v1/responses, made from the deltas of a chat completion."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from linalign import InvalidRequest, Output
from linalign.server.core_errors import described
from linalign.server.deltas import Delta, Parser
from linalign.server.engine_client import EngineClient
from linalign.server.exchange import Applied
from linalign.server.protocol.responses import FunctionTool, ResponsesRequest
from linalign.server.replies.events import FAILURES, Event
from linalign.server.replies.objects import logprob_object, usage_object
from linalign.server.replies.submission import Replies

PATH = "/v1/responses"
ResponseEvent = dict[str, Any]
Keep = Callable[[str, list[dict[str, Any]]], None]  # takes the id of a response, and its output items


class ModelResponse:
    """Creates the reply of one request: `whole` for a single object, `events` for a stream."""

    def __init__(
        self,
        engine: EngineClient,
        body: ResponsesRequest,
        parser: Parser,
        applied: Applied | None,
        keep: Keep | None,
    ) -> None:
        """applied: What the request is aligned with. keep: Keeps the response; None if it should not be kept."""
        self._applied, self._keep = applied, keep
        self._token_bytes, self._parser = engine.token_bytes, parser
        self._items = _Items()
        self._pending: list[dict[str, Any]] = []  # log-probabilities of tokens whose text has not been emitted
        functions = [tool for tool in body.tools or () if isinstance(tool, FunctionTool)]
        tools = [{"type": "function", "strict": tool.strict, **tool.as_openai()["function"]} for tool in functions]
        choice = body.tool_choice or "auto"
        self._num_reasoning_tokens = 0
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": body.model,
            "output": self._items.done,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "store": keep is not None,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "text": {"format": {"type": "text"}}
            if body.text is None or body.text.format is None
            else body.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": tools,
            "truncation": "disabled",
            "usage": None,
        }

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        for output in outputs:
            self._process(output)
        return self._response

    async def events(self, replies: Replies) -> AsyncIterator[Event]:
        number = 0

        def numbered(event: ResponseEvent) -> Event:
            nonlocal number
            number += 1
            return Event({**event, "sequence_number": number - 1}, event["type"])

        try:
            for kind in ("response.created", "response.in_progress"):
                yield numbered({"type": kind, "response": self._response})
            async for output in replies:
                for event in self._process(output):
                    yield numbered(event)
            status = self._response["status"]
            yield numbered({"type": f"response.{status}", "response": self._response})
        except FAILURES as error:
            code, message = "server_error", str(error)
            if isinstance(error, InvalidRequest):
                code, (message, _) = "invalid_prompt", described(error, PATH)
            failed = {"status": "failed", "error": {"code": code, "message": message}}
            yield numbered({"type": "response.failed", "response": self._response | failed})
        finally:
            replies.abort()

    def _process(self, output: Output) -> list[ResponseEvent]:
        self._pending += [logprob_object(report, self._token_bytes) for report in output.logprobs]
        events = []
        deltas = self._parser.feed(output.text) + (self._parser.finish() if output.finish_reason else [])
        if any("reasoning_content" in delta for delta in deltas):
            self._num_reasoning_tokens += len(output.token_ids)
        for delta in deltas:
            events += self._items.take(delta, self._pending if "content" in delta else [])
            self._pending = []
        if output.finish_reason:
            status = "completed" if output.finish_reason == "stop" else "incomplete"
            events += self._items.close(status, self._pending)
            self._response["status"] = status
            if status == "incomplete":
                reason = "max_output_tokens" if output.finish_reason == "length" else "abort"
                self._response["incomplete_details"] = {"reason": reason}
            assert output.usage is not None
            usage = usage_object([output.usage], self._applied)
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            self._response["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {
                    "cached_tokens": cached,
                    "cache_write_tokens": usage["prompt_tokens"] - cached,
                },
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
                "total_tokens": usage["total_tokens"],
                "alignment_details": usage["alignment_details"],
            }
            if self._keep is not None:
                self._keep(self._response["id"], self._response["output"])
        return events


class _Items:
    """The output items so far: reasoning, messages, function calls. The last one may be incomplete.

    done: The complete items.
    """

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None

    def take(self, delta: Delta, logprobs: list[dict[str, Any]]) -> list[ResponseEvent]:
        if "tool_calls" in delta:
            (call,) = delta["tool_calls"]
            events = self._open_call(call) if "id" in call else []
            return events + self._extend_call(call["function"]["arguments"])
        kind = "message" if "content" in delta else "reasoning"
        text = delta["content"] if kind == "message" else delta["reasoning_content"]
        events = [] if self._open is not None and self._open["type"] == kind else self._open_text(kind)
        return events + self._extend_text(text, logprobs)

    def close(self, status: str = "completed", logprobs: Sequence[dict[str, Any]] = ()) -> list[ResponseEvent]:
        """End the incomplete item, if there is one. logprobs: Of last tokens that have no text."""
        item, self._open = self._open, None
        if item is None:
            return []
        item["status"] = status
        place = self._position(item)
        if item["type"] == "function_call":
            ends = [{"type": "response.function_call_arguments.done", **place, "arguments": item["arguments"]}]
        else:
            (part,) = item["content"]
            ends = [{"type": f"response.{part['type']}.done", **place, "content_index": 0, "text": part["text"]}]
            if part["type"] == "output_text":
                part["logprobs"] = [*part["logprobs"], *logprobs]
                ends[0]["logprobs"] = part["logprobs"]
            ends.append({"type": "response.content_part.done", **place, "content_index": 0, "part": part})
        ends.append({"type": "response.output_item.done", "output_index": place["output_index"], "item": item})
        self.done.append(item)
        return ends

    def _position(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.done)}

    def _add(self, item: dict[str, Any]) -> list[ResponseEvent]:
        events = self.close()
        self._open = item
        shown = {**item, "content": []} if "content" in item else dict(item)
        return [*events, {"type": "response.output_item.added", "output_index": len(self.done), "item": shown}]

    def _open_call(self, call: dict[str, Any]) -> list[ResponseEvent]:
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": "",
            "status": "in_progress",
        }
        return self._add(item)

    def _extend_call(self, text: str) -> list[ResponseEvent]:
        if not text or self._open is None:
            return []
        self._open["arguments"] += text
        return [{"type": "response.function_call_arguments.delta", **self._position(self._open), "delta": text}]

    def _open_text(self, kind: str) -> list[ResponseEvent]:
        item: dict[str, Any]
        if kind == "message":
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": f"rs_{uuid.uuid4().hex}", "type": "reasoning", "summary": [], "status": "in_progress"}
        item["content"] = [part]
        events = self._add(item)
        added = {"type": "response.content_part.added", **self._position(item), "content_index": 0, "part": dict(part)}
        return [*events, added]

    def _extend_text(self, text: str, logprobs: list[dict[str, Any]]) -> list[ResponseEvent]:
        assert self._open is not None
        (part,) = self._open["content"]
        part["text"] += text
        event = {
            "type": f"response.{part['type']}.delta",
            **self._position(self._open),
            "content_index": 0,
            "delta": text,
        }
        if part["type"] == "output_text":
            part["logprobs"] = part["logprobs"] + logprobs
            event["logprobs"] = logprobs
        return [event]
