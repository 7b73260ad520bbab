"""Messages of a chat, as clients send them.

Clients send replies back in the form in which they received or parsed them, so these schemas accept what SDKs,
gateways and agents add, and calls with broken arguments.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from linalign.server.protocol.schema import FAIL_FAST, OpenSchema
from linalign.server.protocol.strict_json import InvalidBody, refuse_too_many_values, strict


class TextPart(OpenSchema):
    type: Literal["text"]
    text: str


class RefusalPart(OpenSchema):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ThinkingPart(OpenSchema):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = Field(None, description="no effect")


class ReasoningPart(OpenSchema):
    type: Literal["reasoning"]
    text: str | None = None


class RedactedThinkingPart(OpenSchema):
    type: Literal["redacted_thinking"]


Content = str | Annotated[list[TextPart], FAIL_FAST]
ReplyPart = Annotated[
    TextPart | RefusalPart | ThinkingPart | ReasoningPart | RedactedThinkingPart, Field(discriminator="type")
]
ReplyContent = str | Annotated[list[ReplyPart], FAIL_FAST]


class FunctionCall(OpenSchema):
    name: str
    arguments: str | dict[str, Any] | list[Any] | None = Field(
        None, description="a JSON object, as a string; other values are shown to the model as they are"
    )

    @property
    def arguments_text(self) -> str:
        """The arguments as text. Clients may send them parsed."""
        value = self.arguments
        return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


class ToolCall(OpenSchema):
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall
    index: int | None = Field(None, description="no effect; streamed calls have it")


class _Message(OpenSchema):
    name: str | None = None


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Message):
    role: Literal["user"]
    content: Content


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: ReplyContent | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="another name of reasoning_content")
    tool_calls: Annotated[list[ToolCall], FAIL_FAST] | None = None
    function_call: FunctionCall | None = Field(None, description="OpenAI's earlier form of tool_calls")

    @property
    def thoughts(self) -> str | None:
        """The reasoning, under any of its names."""
        parts = [] if self.content is None or isinstance(self.content, str) else self.content
        in_parts = [part.thinking for part in parts if isinstance(part, ThinkingPart)]
        in_parts += [part.text or "" for part in parts if isinstance(part, ReasoningPart)]
        return self.reasoning_content or self.reasoning or "\n".join(in_parts) or None

    @property
    def calls(self) -> list[ToolCall]:
        calls = self.tool_calls or []
        if self.function_call is None:
            return calls
        return [*calls, ToolCall.model_construct(id=self.function_call.name, function=self.function_call)]


class ToolMessage(_Message):
    role: Literal["tool"]
    content: Content | None = None
    tool_call_id: str | None = None


class FunctionMessage(_Message):
    """OpenAI's earlier form of a tool message."""

    role: Literal["function"]
    content: Content | None = None
    name: str


AnyMessage = SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage
Message = Annotated[AnyMessage, Field(discriminator="role")]


def rendered(messages: Sequence[AnyMessage]) -> list[dict[str, Any]]:
    """The messages in the form that chat templates expect.

    The arguments of a call are an object if its text is the JSON of one, else the text itself. All are texts if they
    have more JSON values together than a body may have.
    """
    calls = [call for message in messages if isinstance(message, AssistantMessage) for call in message.calls]
    texts = [call.function.arguments_text for call in calls]
    try:
        refuse_too_many_values(",".join(texts))
        arguments = iter([_parsed(text) for text in texts])
    except ValueError:
        arguments = iter(texts)
    return [_rendered(message, arguments) for message in messages]


def num_characters(message: AnyMessage) -> int:
    """About how many characters a message holds."""
    num = len(_joined(message.content))
    if isinstance(message, AssistantMessage):
        num += len(message.thoughts or "") + sum(len(call.function.arguments_text) for call in message.calls)
    return num


def _rendered(message: AnyMessage, arguments: Any) -> dict[str, Any]:
    """One message. arguments: An iterator over the arguments of its calls, and of later ones."""
    shown: dict[str, Any] = {"role": message.role, "content": _joined(message.content)}
    if message.name is not None:
        shown["name"] = message.name
    match message:
        case SystemMessage():
            shown["role"] = "system"
        case ToolMessage(tool_call_id=id):
            shown["tool_call_id"] = id or ""
        case FunctionMessage(name=name):
            shown |= {"role": "tool", "tool_call_id": name}
        case AssistantMessage(thoughts=thoughts, calls=calls):
            if thoughts is not None:
                shown["reasoning_content"] = thoughts
            if calls:
                shown["tool_calls"] = [
                    {
                        "id": call.id or "",
                        "type": "function",
                        "function": {"name": call.function.name, "arguments": next(arguments)},
                    }
                    for call in calls
                ]
    return shown


def _parsed(arguments: str) -> dict[str, Any] | str:
    """The arguments as an object; as they are if they are something else, such as JSON that was cut off."""
    try:
        value = strict(arguments or "{}")
    except (ValueError, InvalidBody):
        return arguments
    return value if isinstance(value, dict) else {} if value is None else arguments


def _joined(content: str | Sequence[Any] | None) -> str:
    """The text of a content, with line ends between its parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if isinstance(part, TextPart | RefusalPart))
