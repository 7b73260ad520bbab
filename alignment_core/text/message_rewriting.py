"""Rewrites messages for chat templates that can't show them as they are: see ChatTemplate, which tries a template."""

import json
from collections.abc import Mapping
from typing import Any

from linalign.alignment_core.errors import InvalidRequest

Messages = list[dict[str, Any]]


def with_object_arguments(messages: Messages) -> Messages:
    """Put arguments that are a text into an object, for templates that read their members."""

    def changed(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            return call
        return {**call, "function": {**call["function"], "arguments": {"arguments": arguments}}}

    return [
        {**message, "tool_calls": list(map(changed, message["tool_calls"]))} if message.get("tool_calls") else message
        for message in messages
    ]


def with_single_calls(messages: Messages) -> Messages:
    """Split messages with several calls: one message for each call, with its result after it."""
    split: Messages = []
    for message in messages:
        calls = message.get("tool_calls") or []
        if message["role"] == "tool" and (place := _place_of_call(split, message.get("tool_call_id"))):
            split.insert(place, message)
            continue
        split.append({**message, "tool_calls": calls[:1]} if calls else message)
        split += [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls[1:]]
    return split


def _place_of_call(messages: Messages, id: str | None) -> int:
    """The index behind the last message with a call of this id; 0 if there is none."""
    places = (place for place, m in enumerate(messages, 1) if m.get("tool_calls") and m["tool_calls"][0]["id"] == id)
    return max(places, default=0)


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

    That is the convention for models without a system role. Raises InvalidRequest if no user message follows.
    """
    folded: Messages = []
    pending: list[str] = []
    for message in messages:
        if message["role"] == "system":
            pending.append(message["content"])
        elif message["role"] == "user" and pending:
            folded.append({"role": "user", "content": "\n\n".join([*pending, message["content"]])})
            pending = []
        else:
            folded.append(message)
    if pending:
        raise InvalidRequest(
            "this model has no system role, so a system message needs a user message after it", "messages"
        )
    return folded


def described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The tool with a description, which is empty if the tool has none."""
    return {**tool, "function": {"description": "", **tool["function"]}}
