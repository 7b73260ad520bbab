"""The request schema of /v1/chat/completions. Unknown fields are an error."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from linalign import SamplingParams
from linalign.alignment_core.request import MAX_LOGPROBS
from linalign.alignment_core.text.chat_template import Rendering
from linalign.server.protocol.generation import (
    FAIL_FAST,
    AlignmentFields,
    GenerationRequest,
    Metadata,
    Schema,
    field_error,
)
from linalign.server.protocol.strict_json import InvalidBody, refuse_too_many_values, strict

MAX_TOOLS = 1024


class TextPart(Schema):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1), FAIL_FAST]


class FunctionCall(Schema):
    name: str
    arguments: str = Field(description="a JSON object, as a string")


def _is_object(text: str) -> bool:
    try:
        return isinstance(strict(text), dict)
    except (ValueError, InvalidBody):
        return False


class ToolCall(Schema):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, description="no effect; streamed calls have it")


class _Message(Schema):
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_fields(cls, message: Any) -> Any:
        """Drop empty fields of reply messages, because SDKs send them back with the conversation."""
        if not isinstance(message, dict):
            return message
        return {key: value for key, value in message.items() if key not in MAY_BE_EMPTY or value not in (None, [])}

    def rendered(self) -> dict[str, Any]:
        """The message in the form that chat templates expect."""
        message: dict[str, Any] = {"role": self.role, "content": _joined(self.content)}  # type: ignore[attr-defined]
        return message if self.name is None else {**message, "name": self.name}


MAY_BE_EMPTY = ("refusal", "audio", "function_call", "annotations", "tool_calls", "reasoning_content")


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Content

    def rendered(self) -> dict[str, Any]:
        return {**super().rendered(), "role": "system"}


class UserMessage(_Message):
    role: Literal["user"]
    content: Content


class AssistantMessage(_Message):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1), FAIL_FAST] | None = None

    @model_validator(mode="after")
    def _has_content_or_calls(self) -> "AssistantMessage":
        if self.content is None and self.tool_calls is None:
            raise ValueError("an assistant message needs content or tool_calls")
        return self

    def rendered(self) -> dict[str, Any]:
        message = super().rendered()
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls is not None:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": json.loads(call.function.arguments or "{}")},
                }
                for call in self.tool_calls
            ]
        return message


class ToolMessage(_Message):
    role: Literal["tool"]
    content: Content
    tool_call_id: str

    def rendered(self) -> dict[str, Any]:
        return {**super().rendered(), "tool_call_id": self.tool_call_id}


AnyMessage = SystemMessage | UserMessage | AssistantMessage | ToolMessage
Message = Annotated[AnyMessage, Field(discriminator="role")]


class Function(Schema):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="calls follow the schema; calls that tool_choice requires always do")

    @model_validator(mode="after")
    def _has_object_schema(self) -> Self:
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise ValueError("parameters must be the schema of an object")
        return self


class Tool(Schema):
    type: Literal["function"]
    function: Function


class FunctionName(Schema):
    name: str


class NamedTool(Schema):
    type: Literal["function"]
    function: FunctionName


class ChatFields(AlignmentFields):
    """The fields from which the chat template renders a prompt."""

    messages: Annotated[list[Message], Field(min_length=1), FAIL_FAST] | None = None
    principle_placement: Literal["system", "user"] | None = None
    chat_template_kwargs: dict[str, str | bool | int | float] | None = Field(
        None, description="variables for the model's chat template, which must use them"
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="passed to chat templates that use it"
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), FAIL_FAST] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    continue_final_message: bool | None = Field(
        None, description="continue the last message, which must be the assistant's"
    )
    add_generation_prompt: bool | None = Field(None, description="false requires continue_final_message")

    def check(self) -> None:
        super().check()
        self._check_arguments()
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise field_error(
                "add_generation_prompt", "add_generation_prompt must be the opposite of continue_final_message"
            )
        if self.requires_call and not self.callable_tools():
            raise field_error("tool_choice", "tool_choice requires a call, but tools has no such function")

    def _check_arguments(self) -> None:
        """The arguments of all calls together may have as many JSON values as a body."""
        calls = {
            f"messages.{i}.tool_calls.{j}.function.arguments": call.function.arguments or "{}"
            for i, message in enumerate(self.messages or ())
            if isinstance(message, AssistantMessage)
            for j, call in enumerate(message.tool_calls or ())
        }
        try:
            refuse_too_many_values(",".join(calls.values()))
        except ValueError as error:
            raise field_error("messages", f"the arguments of calls are too long: {error}") from error
        for param, arguments in calls.items():
            if not _is_object(arguments):
                raise field_error(param, f"{param}: arguments must be a JSON object, as a string")

    @property
    def requires_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def callable_tools(self) -> list[dict[str, Any]]:
        """The functions that the reply may call, in OpenAI's form."""
        if self.tool_choice == "none":
            return []
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            tools = [tool for tool in tools if tool["function"]["name"] == self.tool_choice.function.name]
        return tools

    def rendering(self) -> Rendering:
        variables: dict[str, Any] = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
        tools = self.callable_tools()
        for tool in tools:
            tool["function"].pop("strict", None)  # an option of the server, not for the model
        return Rendering(tools, variables, bool(self.continue_final_message))


class ChatCompletionRequest(GenerationRequest, ChatFields):
    """OpenAI's request, with the alignment fields at the top level (`extra_body` in the SDKs)."""

    messages: Annotated[list[Message], Field(min_length=1), FAIL_FAST]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: Metadata | None = Field(None, description="any data of the client; no effect on the reply")
    parallel_tool_calls: bool | None = Field(None, description="false keeps only the first call")

    @classmethod
    def unsupported(cls) -> dict[str, Any]:
        return UNSUPPORTED

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise field_error("max_tokens", "max_tokens and max_completion_tokens mean the same: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs needs logprobs: true")
        if self.callable_tools() and self.structure():
            name = "structured_outputs" if self.structured_outputs else "response_format"
            raise field_error(name, f"tools and {name} exclude each other, unless tool_choice is 'none'")

    def sampling_params(self, **more: Any) -> SamplingParams:
        max_tokens = self.max_completion_tokens or self.max_tokens
        num_top = (self.top_logprobs or 0) if self.logprobs else None
        return super().sampling_params(max_tokens=max_tokens, logprobs=num_top, **more)


def _joined(content: str | list[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


UNSUPPORTED: dict[str, Any] = {
    "store": False,
    "modalities": ["text"],
    "audio": None,
    "prediction": None,
    "web_search_options": None,
    "functions": None,
    "function_call": None,
    "service_tier": "auto",
    "verbosity": None,
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
    "safety_identifier": None,
    "moderation": None,
    "best_of": 1,
}
