"""The request schema of /v1/responses, and its conversion to a chat completion."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter

from linalign.alignment_core.request import MAX_LOGPROBS
from linalign.server.core_errors import RESPONSE_FIELDS
from linalign.server.protocol.chat_like import ChatLike
from linalign.server.protocol.chat_messages import (
    AnyMessage,
    AssistantMessage,
    FunctionCall,
    RefusalPart,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from linalign.server.protocol.chat_request import ChatCompletionRequest
from linalign.server.protocol.generation import (
    CacheSalt,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Metadata,
    ResponseFormat,
    Seed,
    TextFormat,
)
from linalign.server.protocol.schema import FAIL_FAST, WHOLE, MaxTokens, OpenSchema, ThinkingBudget, field_error
from linalign.server.protocol.tools import (
    MAX_TOOLS,
    Function,
    FunctionName,
    NamedTool,
    OtherTool,
    Tool,
    kind_of_tool,
)
from linalign.server.reasoning import Effort

LOGPROBS = "message.output_text.logprobs"  # the only value of `include` that has an effect


class _Item(OpenSchema):
    id: str | None = Field(None, description="output items that are sent back have it, and status")
    status: str | None = None


class InputText(OpenSchema):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(None, description="no effect; output items that are sent back have it")
    logprobs: list[Any] | None = Field(None, description="no effect; output items that are sent back have it")


Part = Annotated[InputText | RefusalPart, Field(discriminator="type")]
Content = str | Annotated[list[Part], FAIL_FAST]


class InputMessage(_Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None

    def as_chat(self) -> AnyMessage:
        content = _joined(self.content)
        if self.role == "user":
            return UserMessage.model_construct(role="user", content=content)
        if self.role == "assistant":
            return AssistantMessage.model_construct(role="assistant", content=content)
        return SystemMessage.model_construct(role=self.role, content=content)


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str | dict[str, Any] | list[Any] | None = None

    def as_chat(self) -> AnyMessage:
        function = FunctionCall.model_construct(name=self.name, arguments=self.arguments)
        call = ToolCall.model_construct(id=self.call_id, function=function)
        return AssistantMessage.model_construct(role="assistant", tool_calls=[call])


class FunctionCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Content | None = None

    def as_chat(self) -> AnyMessage:
        return ToolMessage.model_construct(role="tool", tool_call_id=self.call_id, content=_joined(self.output))


class ReasoningText(OpenSchema):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    summary: list[Any] | None = Field(None, description="no effect")
    content: Annotated[list[ReasoningText], FAIL_FAST] | None = None

    def as_chat(self) -> AnyMessage:
        text = "".join(part.text for part in self.content or ())
        return AssistantMessage.model_construct(role="assistant", reasoning_content=text or None)


class ItemReference(OpenSchema):
    """An item of an earlier response."""

    type: Literal["item_reference"] | None = None
    id: str


def _joined(content: str | list[InputText | RefusalPart] | None) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _type(item: Any) -> Any:
    if not isinstance(item, dict):
        return "message item"
    is_reference = "id" in item and "role" not in item
    return f"{item.get('type') or ('item_reference' if is_reference else 'message')} item"


Item = Annotated[
    Annotated[InputMessage, Tag("message item")]
    | Annotated[FunctionCallItem, Tag("function_call item")]
    | Annotated[FunctionCallOutput, Tag("function_call_output item")]
    | Annotated[ReasoningItem, Tag("reasoning item")]
    | Annotated[ItemReference, Tag("item_reference item")],
    Discriminator(_type, custom_error_type="invalid_item", custom_error_message="there is no item of this type"),
]


ITEMS = TypeAdapter(list[Item])


class FunctionTool(Function):
    type: Literal["function"]

    def as_chat(self) -> Tool:
        function = {name: getattr(self, name) for name in Function.model_fields}
        return Tool.model_construct(type="function", function=Function.model_construct(**function))


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function tool")] | Annotated[OtherTool, Tag("other tool")], Discriminator(kind_of_tool)
]


class FunctionChoice(OpenSchema):
    type: Literal["function"]
    name: str


class JsonSchemaText(OpenSchema):
    type: Literal["json_schema"]
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class TextOptions(OpenSchema):
    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaText, Field(discriminator="type")] | None = None


class Reasoning(OpenSchema):
    effort: Effort | None = None


class ResponsesRequest(ChatLike):
    """OpenAI's request, with the alignment fields at the top level."""

    input: str | Annotated[list[Item], Field(min_length=1), FAIL_FAST]
    instructions: str | None = None
    max_output_tokens: MaxTokens = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, WHOLE, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS), FAIL_FAST] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    thinking_token_budget: ThinkingBudget = None
    stream: bool | None = None
    store: bool | None = Field(None, description="keep the response, by default if the server keeps responses")
    metadata: Metadata | None = Field(None, description="returned unchanged")
    user: str | None = None
    cache_salt: CacheSalt | None = None
    previous_response_id: str | None = None
    include: list[str] | None = Field(None, description=f"{LOGPROBS}; other values are ignored")
    seed: Seed | None = None
    principle_placement: Literal["system", "user"] | None = None

    @classmethod
    def unsupported(cls) -> dict[str, Any]:
        return UNSUPPORTED

    def check(self) -> None:
        super().check()
        if self.user is not None:
            self._ignored.append("user")
        self._ignored += dict.fromkeys(f"include.{name}" for name in self.include or () if name != LOGPROBS)
        messages = self._messages()
        if not messages and not self.references:
            raise field_error("input", "input has no message")
        self.convert(messages, self._chat_fields(), SAME_IN_CHAT, RESPONSE_FIELDS)

    def _chat_fields(self) -> dict[str, Any]:
        """Fields of the chat completion that have other names here."""
        fields: dict[str, Any] = {}
        if self.tools is not None:
            tools = [tool.as_chat() if isinstance(tool, FunctionTool) else tool for tool in self.tools]
            fields["tools"] = tools
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            function = FunctionName.model_construct(name=choice.name)
            fields["tool_choice"] = NamedTool.model_construct(type="function", function=function)
        elif choice is not None:
            fields["tool_choice"] = choice
        if self.text and self.text.format:
            fields["response_format"] = _chat_format(self.text.format)
        if LOGPROBS in (self.include or ()) or self.top_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.reasoning and self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.max_output_tokens is not None:
            fields["max_completion_tokens"] = self.max_output_tokens
        return fields

    def _messages(self) -> list[AnyMessage]:
        if isinstance(self.input, str):
            messages: list[AnyMessage] = [UserMessage.model_construct(role="user", content=self.input)]
        else:
            messages = _messages_of(self.input)
        if self.instructions is not None:
            messages.insert(0, SystemMessage.model_construct(role="system", content=self.instructions))
        return messages

    @property
    def references(self) -> list[str]:
        """The ids of items of earlier responses."""
        if isinstance(self.input, str):
            return []
        return [item.id for item in self.input if isinstance(item, ItemReference)]

    def resolved(self, items: Mapping[str, Item]) -> "ResponsesRequest":
        """The request with items in place of the references to them."""
        given = [items[item.id] if isinstance(item, ItemReference) else item for item in self.input]
        body = self.model_copy(update={"input": given})
        body.check()
        return body

    def continued(self, chat: ChatCompletionRequest, earlier: Sequence[AnyMessage]) -> ChatCompletionRequest:
        """The chat completion with earlier messages in front of the input, behind the instructions."""
        first = 0 if self.instructions is None else 1
        messages = [*chat.messages[:first], *earlier, *chat.messages[first:]]
        return chat.model_copy(update={"messages": messages})

    def conversation(self, chat: ChatCompletionRequest, output: Sequence[Item]) -> list[AnyMessage]:
        """The messages of the chat completion, without instructions, and those of output items."""
        first = 0 if self.instructions is None else 1
        return [*chat.messages[first:], *_messages_of(output)]


def items_of(output: Sequence[Any]) -> list[Item]:
    """The output of a response as items of a request."""
    return ITEMS.validate_python(output)


def _messages_of(items: Sequence[Item]) -> list[AnyMessage]:
    """The messages of items. Consecutive parts of one reply become one message."""
    messages: list[AnyMessage] = []
    for item in items:
        if isinstance(item, ItemReference):  # not resolved yet
            continue
        message, last = item.as_chat(), messages[-1] if messages else None
        if (
            isinstance(last, AssistantMessage)
            and isinstance(message, AssistantMessage)
            and (last.content is None or message.content is None)
        ):
            _merge(last, message)
        else:
            messages.append(message)
    # Leave out replies that have only reasoning.
    return [m for m in messages if m.content is not None or (isinstance(m, AssistantMessage) and m.tool_calls)]


def _merge(message: AssistantMessage, part: AssistantMessage) -> None:
    """Add another part of the same reply to a message: reasoning, text, or calls."""
    if part.content is not None:
        message.content = part.content
    if part.reasoning_content is not None:
        message.reasoning_content = "\n".join(filter(None, [message.reasoning_content, part.reasoning_content]))
    if part.tool_calls:
        message.tool_calls = message.tool_calls or []
        message.tool_calls += part.tool_calls


# Fields of the same name and meaning in a chat completion.
SAME_IN_CHAT = (
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "thinking_token_budget",
    "stream",
    "seed",
    "principle_placement",
    "cache_salt",
)
UNSUPPORTED: dict[str, Any] = {
    "alignment_trace": False,
    "background": False,
    "conversation": None,
    "prompt": None,
    "moderation": None,
}


def _chat_format(format: TextFormat | JsonObjectFormat | JsonSchemaText) -> ResponseFormat:
    if not isinstance(format, JsonSchemaText):
        return format
    schema = JsonSchema.model_construct(
        name=format.name, schema_=format.schema_, strict=format.strict, description=format.description
    )
    return JsonSchemaFormat.model_construct(type="json_schema", json_schema=schema)
