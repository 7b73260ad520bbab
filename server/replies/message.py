"""Anthropic's objects and events of /v1/messages, made from the deltas of a chat completion."""

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from linalign import InvalidRequest, Output
from linalign.server.core_errors import described
from linalign.server.deltas import Delta, Parser
from linalign.server.exchange import Applied
from linalign.server.protocol.messages import MessagesRequest
from linalign.server.replies.events import FAILURES, Event
from linalign.server.replies.objects import usage_object
from linalign.server.replies.submission import Replies

PATH = "/v1/messages"
MessageEvent = dict[str, Any]


class ModelMessage:
    """Creates the reply of one request: `whole` for a single object, `events` for a stream."""

    def __init__(self, body: MessagesRequest, parser: Parser, num_prompt_tokens: int, applied: Applied | None) -> None:
        """applied: What the request is aligned with."""
        self._parser, self._applied = parser, applied
        self._arguments = ""  # of the call that is not complete
        self._message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": body.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": num_prompt_tokens, "output_tokens": 0},
        }
        self._is_open = False  # whether the last block of the content is incomplete

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        for output in outputs:
            self._process(output)
        return self._message

    async def events(self, replies: Replies) -> AsyncIterator[Event]:
        def sent(event: MessageEvent) -> Event:
            return Event(event, event["type"])

        try:
            yield sent({"type": "message_start", "message": self._message})
            yield sent({"type": "ping"})
            async for output in replies:
                for event in self._process(output):
                    yield sent(event)
            end = {name: self._message[name] for name in ("stop_reason", "stop_sequence")}
            yield sent({"type": "message_delta", "delta": end, "usage": self._message["usage"]})
            yield sent({"type": "message_stop"})
        except FAILURES as error:
            kind, message = "api_error", str(error)
            if isinstance(error, InvalidRequest):
                kind, (message, _) = "invalid_request_error", described(error, PATH)
            yield sent({"type": "error", "error": {"type": kind, "message": message}})
        finally:
            replies.abort()

    def _process(self, output: Output) -> list[MessageEvent]:
        deltas = self._parser.feed(output.text) + (self._parser.finish() if output.finish_reason else [])
        events = [event for delta in deltas for event in self._take(delta)]
        if output.finish_reason:
            events += self._close()
            self._end(output)
        return events

    def _take(self, delta: Delta) -> list[MessageEvent]:
        if "tool_calls" in delta:
            (call,) = delta["tool_calls"]
            events = []
            if "id" in call:
                name = call["function"]["name"]
                events = self._open({"type": "tool_use", "id": call["id"], "name": name, "input": {}})
            text = call["function"]["arguments"]
            self._arguments += text
            return [*events, *self._change({"type": "input_json_delta", "partial_json": text})] if text else events
        kind, name = ("text", "content") if "content" in delta else ("thinking", "reasoning_content")
        blocks = self._message["content"]
        events = []
        if not self._is_open or blocks[-1]["type"] != kind:
            more = {"signature": ""} if kind == "thinking" else {}
            events = self._open({"type": kind, kind: "", **more})
        blocks[-1][kind] += delta[name]
        return [*events, *self._change({"type": f"{kind}_delta", kind: delta[name]})]

    def _open(self, block: dict[str, Any]) -> list[MessageEvent]:
        events = self._close()
        self._message["content"].append(block)
        self._is_open = True
        return [*events, {"type": "content_block_start", "index": self._index, "content_block": dict(block)}]

    def _change(self, delta: dict[str, Any]) -> list[MessageEvent]:
        return [{"type": "content_block_delta", "index": self._index, "delta": delta}]

    def _close(self) -> list[MessageEvent]:
        """End the last block, if it is incomplete."""
        if not self._is_open:
            return []
        block = self._message["content"][-1]
        if block["type"] == "tool_use":
            block["input"], self._arguments = _object(self._arguments), ""
        self._is_open = False
        return [{"type": "content_block_stop", "index": self._index}]

    @property
    def _index(self) -> int:
        return len(self._message["content"]) - 1

    def _end(self, output: Output) -> None:
        """Set why the message ended, and its usage."""
        assert output.usage is not None
        has_calls = any(block["type"] == "tool_use" for block in self._message["content"])
        reason = {"stop": "end_turn", "length": "max_tokens"}.get(output.finish_reason or "")
        if output.finish_reason == "stop" and has_calls:
            reason = "tool_use"
        elif output.stop_string is not None:
            reason = "stop_sequence"
            self._message["stop_sequence"] = output.stop_string
        self._message["stop_reason"] = reason
        usage = usage_object([output.usage], self._applied)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self._message["usage"] = {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage["completion_tokens"],
            "alignment_details": usage["alignment_details"],
        }


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; empty if max_tokens has cut them off."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
