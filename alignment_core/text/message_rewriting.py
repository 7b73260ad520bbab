"""Rewrites messages for chat templates that can't show them as they are: see ChatTemplate, which tries a template."""

import itertools
import json
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

Messages = list[dict[str, Any]]


def with_object_arguments(messages: Messages) -> Messages:
    """Put arguments that are a text into an object, for templates that read their members."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            return call
        return {**call, "function": {**call["function"], "arguments": {"arguments": arguments}}}

    return _with_calls(messages, changed)


def with_text_arguments(messages: Messages) -> Messages:
    """Write arguments that are an object as JSON, for templates that join texts."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": text}}

    return _with_calls(messages, changed)


def _with_calls(messages: Messages, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> Messages:
    return [
        {**message, "tool_calls": list(map(changed, message["tool_calls"]))} if message.get("tool_calls") else message
        for message in messages
    ]


def with_single_calls(messages: Messages) -> Messages:
    """Split messages with several calls: one message for each call, with its results behind it."""
    split: Messages = []
    turn = _Turn({"role": "assistant"})
    for message in messages:
        if turn.parts and message["role"] == "tool":
            turn.add(message)
            continue
        split += itertools.chain(*turn.parts)
        turn = _Turn(message)
        if not turn.parts:
            split.append(message)
    return [*split, *itertools.chain(*turn.parts)]


class _Turn:
    """The calls of a message. parts: A message for each call, with its results."""

    def __init__(self, message: dict[str, Any]) -> None:
        calls = message.get("tool_calls") or []
        shared = [message, *({"role": "assistant", "content": ""} for _ in calls[1:])]
        self.parts = [[{**one, "tool_calls": [call]}] for one, call in zip(shared, calls, strict=False)]
        self._places = defaultdict[str, deque[int]](deque)  # of the calls with each id
        for place, call in enumerate(calls):
            self._places[call["id"]].append(place)
        self._num_results = 0

    def add(self, result: dict[str, Any]) -> None:
        """Put a result behind the first call of its id that has none, or else behind the last one of its id.

        Results with unknown ids are in the order of the calls.
        """
        places = self._places.get(result.get("tool_call_id") or "")
        place = min(self._num_results, len(self.parts) - 1)
        if places:
            place = places.popleft() if len(places) > 1 else places[0]
        self.parts[place].append(result)
        self._num_results += 1


def with_known_results(messages: Messages) -> Messages:
    """Write results as texts of the user if no call precedes them, for templates that need the call."""
    changed: Messages = []
    has_calls = False
    for message in messages:
        if message["role"] == "assistant":
            has_calls = bool(message.get("tool_calls"))
        is_unknown = message["role"] == "tool" and not has_calls
        changed.append({"role": "user", "content": message["content"]} if is_unknown else message)
    return changed


def with_reasoning_as_content(messages: Messages) -> Messages:
    """Put the reasoning in front of the content, in messages that have both and calls."""
    return [
        {name: value for name, value in {**message, "content": _both(message)}.items() if name != "reasoning_content"}
        if message.get("tool_calls") and message.get("content") and message.get("reasoning_content")
        else message
        for message in messages
    ]


def _both(message: dict[str, Any]) -> str:
    return f"{message['reasoning_content']}\n{message['content']}"


def without_tool_messages(messages: Messages) -> Messages:
    """Write tool calls and results as text, in the format of Hermes and Qwen, for templates without tools."""
    converted: Messages = []
    for message in messages:
        if message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            converted.append({"role": "user", "content": content})
        elif message.get("tool_calls"):
            calls = [f"<tool_call>\n{_call_text(call['function'])}\n</tool_call>" for call in message["tool_calls"]]
            converted.append(
                {"role": "assistant", "content": "\n".join([*filter(None, [message.get("content")]), *calls])}
            )
        else:
            converted.append(message)
    return converted


def _call_text(function: dict[str, Any]) -> str:
    """A call as the model writes it. Arguments that are a text, such as JSON that was cut off, stay as they are."""
    name, arguments = json.dumps(function["name"], ensure_ascii=False), function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {text}}}'


def without_system_role(messages: Messages) -> Messages:
    """Put each system text at the beginning of the next user message, followed by a blank line.

    That is the convention for models without a system role. If no user message follows, the text ends the user message
    in front of it, or is a user message itself.
    """
    folded: Messages = []
    pending: list[str] = []
    place = 0  # of the first pending text
    for message in messages:
        if message["role"] == "system":
            place = place if pending else len(folded)
            pending.append(message["content"])
        elif message["role"] == "user" and pending:
            folded.append({"role": "user", "content": "\n\n".join([*pending, message["content"]])})
            pending = []
        else:
            folded.append(message)
    if pending and place and folded[place - 1]["role"] == "user":
        folded[place - 1] = {"role": "user", "content": "\n\n".join([folded[place - 1]["content"], *pending])}
    elif pending:
        folded.insert(place, {"role": "user", "content": "\n\n".join(pending)})
    return folded


def without_defaults(schema: Any) -> Any:
    """A tool or a schema without the default values of parameters."""
    if isinstance(schema, Mapping):
        return {key: without_defaults(value) for key, value in schema.items() if key != "default"}
    return [without_defaults(item) for item in schema] if isinstance(schema, list) else schema


def described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool with a description, which is empty if the tool has none."""
    return {**tool, "function": {"description": "", **tool["function"]}}
