"""Deltas of messages in OpenAI's format: the parts of a reply, in the order in which they arrive."""

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

Delta = dict[str, Any]
MAX_ID_LENGTH = 24


class Parser(Protocol):
    """Parses the text of one reply to the deltas of its message."""

    def feed(self, text: str) -> list[Delta]:
        """Parse a part of the text."""
        ...

    def finish(self) -> list[Delta]:
        """The end of the message. A call that has only begun is left out."""
        ...


def call_start(index: int, name: str, id_length: int = MAX_ID_LENGTH) -> Delta:
    """The delta that begins a call, with a new id."""
    random = secrets.token_hex(MAX_ID_LENGTH // 2)
    id = f"call_{random}" if id_length == MAX_ID_LENGTH else random[:id_length]
    function = {"name": name, "arguments": ""}
    return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}


def arguments_delta(index: int, arguments: str) -> Delta:
    """The delta that adds a text to the arguments of a call."""
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def whole(text: str) -> str:
    """The text with halves of surrogate pairs replaced: JSON can spell them, a reply can't hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def message_of(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The complete message of these deltas."""
    message: dict[str, Any] = {"role": "assistant", "content": None}
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls[call["index"]] = {
                    "id": call["id"], "type": "function", "function": dict(call["function"]),
                }  # fmt: skip
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = list(calls.values())
    elif message["content"] is None:
        message["content"] = ""
    return message
