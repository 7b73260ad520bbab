"""The schema of /v1/responses: what of it can be said as a chat completion, which is what it becomes."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, ValidationError, model_validator

from linalign.alignment_core.request import MAX_LOGPROBS
from linalign.server.protocol.chat_request import MAX_TOOLS, ChatCompletionRequest, Function
from linalign.server.protocol.generation import (
    FIRST,
    AlignmentFields,
    CacheSalt,
    JsonObjectFormat,
    Metadata,
    Schema,
    TextFormat,
    refused,
)


class _Item(Schema):
    id: str | None = Field(None, description="of an output that comes back, as is status")
    status: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_empty(cls, item: Any) -> Any:
        """The SDKs' own objects, given back, have more fields, all of them empty."""
        if not isinstance(item, dict):
            return item
        return {key: value for key, value in item.items() if key in cls.model_fields or value is not None}


class InputText(Schema):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = Field(None, description="of an output that comes back; not looked at")


Content = str | Annotated[list[InputText], Field(min_length=1), FIRST]


class InputMessage(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def as_chat(self) -> dict[str, Any]:
        return {"role": self.role, "content": _joined(self.content)}


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def as_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": self.call_id, "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}


class FunctionCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Content

    def as_chat(self) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": self.call_id, "content": _joined(self.output)}


class ReasoningText(Schema):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    content: Annotated[list[ReasoningText], FIRST] | None = None

    def as_chat(self) -> dict[str, Any]:
        text = "".join(part.text for part in self.content or ())
        return {"role": "assistant", "content": None, "reasoning_content": text}


def _joined(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _type(item: Any) -> Any:
    kind = item.get("type", "message") if isinstance(item, dict) else "message"
    return f"{kind} item"


Item = Annotated[
    Annotated[InputMessage, Tag("message item")]
    | Annotated[FunctionCallItem, Tag("function_call item")]
    | Annotated[FunctionCallOutput, Tag("function_call_output item")]
    | Annotated[ReasoningItem, Tag("reasoning item")],
    Discriminator(_type, custom_error_type="invalid_item", custom_error_message="there is no item of this type"),
]


class FunctionTool(Function):
    type: Literal["function"]


class FunctionChoice(Schema):
    type: Literal["function"]
    name: str


class JsonSchemaText(Schema):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class TextOptions(Schema):
    verbosity: Literal["medium"] | None = None
    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaText, Field(discriminator="type")] | None = None


class Reasoning(Schema):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponsesRequest(AlignmentFields):
    """OpenAI's request with the alignment fields flat at the top level. Nothing is stored."""

    input: str | Annotated[list[Item], Field(min_length=1), FIRST]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS), FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    store: bool | None = Field(None, description="nothing is stored, which the response says")
    metadata: Metadata | None = Field(None, description="returned as it came")
    user: str | None = None
    cache_salt: CacheSalt | None = None
    previous_response_id: str | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    principle_placement: Literal["system", "user"] | None = None
    _chat: ChatCompletionRequest = PrivateAttr()

    @classmethod
    def unsupported(cls) -> dict[str, Any]:
        return UNSUPPORTED

    @model_validator(mode="after")
    def _as_chat(self) -> "ResponsesRequest":
        if self.previous_response_id is not None:
            raise refused("previous_response_id", "this server stores no responses; send the whole input")
        try:
            self._chat = ChatCompletionRequest.model_validate(self._chat_fields())
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"])
            param = first.get("ctx", {}).get("param", path)
            param = "messages" if param.startswith("messages.") else param  # of ours, which nobody sent
            raise refused(RESPONSE_NAMES.get(param, param), first["msg"]) from error
        return self

    @property
    def chat(self) -> ChatCompletionRequest:
        """The chat completion that this is."""
        return self._chat

    def _chat_fields(self) -> dict[str, Any]:
        fields = {
            name: getattr(self, name)
            for name in (*AlignmentFields.model_fields, "temperature", "top_p", "parallel_tool_calls", "stream", "seed")
        }
        if isinstance(self.principle, list):
            fields["principle"] = [item.model_dump() for item in self.principle]
        if self.tools is not None:
            fields["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
                for tool in self.tools
            ]
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        elif choice is not None:
            fields["tool_choice"] = choice
        if self.text and self.text.format:
            fields["response_format"] = _chat_format(self.text.format)
        if self.include or self.top_logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.reasoning and self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        more = {
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "principle_placement": self.principle_placement,
            "cache_salt": self.cache_salt,
        }
        return {name: value for name, value in (fields | more).items() if value is not None}

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            message = item.as_chat()
            last = messages[-1] if messages else {}
            is_more = last.get("content") is None or message["content"] is None
            if message["role"] == last.get("role") == "assistant" and is_more:
                # what one reply was made of: reasoning, text, calls
                calls = [*last.get("tool_calls", []), *message.pop("tool_calls", [])]
                messages[-1] = last | {name: value for name, value in message.items() if value is not None}
                if calls:
                    messages[-1]["tool_calls"] = calls
            else:
                messages.append(message)
        return [m for m in messages if m["content"] is not None or "tool_calls" in m]  # thoughts that led nowhere


# Fields of the chat completion by their names here.
RESPONSE_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "chat_template_kwargs.reasoning_effort": "reasoning.effort",
}
UNSUPPORTED: dict[str, Any] = {
    "alignment_trace": False,
    "background": False,
    "truncation": "disabled",
    "conversation": None,
    "prompt": None,
    "max_tool_calls": None,
    "service_tier": "auto",
    "prompt_cache_key": None,
    "prompt_cache_options": None,
    "prompt_cache_retention": None,
    "safety_identifier": None,
    "moderation": None,
    "image": None,
    "access_programs": None,
    "background_options": None,
    "context_management": None,
    "stream_options": None,
}


def _chat_format(format: TextFormat | JsonObjectFormat | JsonSchemaText) -> dict[str, Any]:
    if isinstance(format, JsonSchemaText):
        schema = format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": "json_schema", "json_schema": schema}
    return {"type": format.type}
