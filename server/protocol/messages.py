"""The request schema of /v1/messages, Anthropic's API, and its conversion to a chat completion."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from linalign.server.core_errors import MESSAGES_FIELDS
from linalign.server.protocol.chat_like import ChatLike
from linalign.server.protocol.chat_messages import (
    AnyMessage,
    AssistantMessage,
    FunctionCall,
    RedactedThinkingPart,
    SystemMessage,
    TextPart,
    ThinkingPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from linalign.server.protocol.generation import CacheSalt, JsonSchema, JsonSchemaFormat, Seed
from linalign.server.protocol.schema import FAIL_FAST, WHOLE, MaxTokens, OpenSchema, ThinkingBudget
from linalign.server.protocol.tools import MAX_TOOLS, Function, FunctionName, NamedTool, OtherTool, Tool
from linalign.server.reasoning import Effort

# Claude Code puts a text that changes with each request in front of the system text. It would spoil the prefix cache.
BILLING_HEADER = "x-anthropic-billing-header"


class ToolUse(OpenSchema):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] | list[Any] | str | None = None


class ToolResult(OpenSchema):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextPart], FAIL_FAST] | None = None
    is_error: bool | None = Field(None, description="no effect; the content says what went wrong")


Block = Annotated[TextPart | ToolUse | ToolResult | ThinkingPart | RedactedThinkingPart, Field(discriminator="type")]


class InputMessage(OpenSchema):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], FAIL_FAST] | None = None

    def as_chat(self) -> list[AnyMessage]:
        """The message as chat messages: results of tools first, then the text."""
        content = self.content or ""
        blocks: Sequence[Block] = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        text = "\n".join(block.text for block in blocks if isinstance(block, TextPart))
        if self.role == "system":
            return [SystemMessage.model_construct(role="system", content=text)]
        if self.role == "assistant":
            return [_reply(text, blocks)]
        results: list[AnyMessage] = [
            ToolMessage.model_construct(role="tool", tool_call_id=block.tool_use_id, content=block.content)
            for block in blocks
            if isinstance(block, ToolResult)
        ]
        has_text = not results or any(isinstance(block, TextPart) for block in blocks)
        return [*results, UserMessage.model_construct(role="user", content=text)] if has_text else results


def _reply(text: str, blocks: Sequence[Block]) -> AssistantMessage:
    calls = [
        ToolCall.model_construct(id=one.id, function=FunctionCall.model_construct(name=one.name, arguments=one.input))
        for one in blocks
        if isinstance(one, ToolUse)
    ]
    thoughts = "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingPart))
    return AssistantMessage.model_construct(
        role="assistant", content=text, reasoning_content=thoughts or None, tool_calls=calls or None
    )


class ClientTool(OpenSchema):
    """A function of the client."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def as_chat(self) -> Tool:
        function = Function(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return Tool.model_construct(type="function", function=function)


def _kind_of_tool(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return "client tool" if kind in (None, "custom") else "other tool"


AnyTool = Annotated[
    Annotated[ClientTool, Tag("client tool")] | Annotated[OtherTool, Tag("other tool")], Discriminator(_kind_of_tool)
]


class ToolChoice(OpenSchema):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(OpenSchema):
    type: str = Field(description="disabled, or another value: for chat templates that use enable_thinking")
    budget_tokens: ThinkingBudget = None


class OutputFormat(OpenSchema):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(OpenSchema):
    effort: Effort | None = None
    format: OutputFormat | None = None


class MessagesRequest(ChatLike):
    """Anthropic's request, with the alignment fields at the top level (`extra_body` in the SDK)."""

    messages: Annotated[list[InputMessage], Field(min_length=1), FAIL_FAST]
    system: str | Annotated[list[TextPart], FAIL_FAST] | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS), FAIL_FAST] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    max_tokens: MaxTokens = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, WHOLE, Field(ge=-1)] | None = None
    stream: bool | None = None
    seed: Seed | None = None
    cache_salt: CacheSalt | None = None
    principle_placement: Literal["system", "user"] | None = None

    @classmethod
    def unsupported(cls) -> dict[str, Any]:
        return {"alignment_trace": False}

    def check(self) -> None:
        super().check()
        given = [*self._system(), *(one for message in self.messages for one in message.as_chat())]
        messages = [kept for message in given if (kept := self._without_billing_header(message))]
        self.convert(messages, self._chat_fields(), SAME_IN_CHAT, MESSAGES_FIELDS)

    def _system(self) -> list[AnyMessage]:
        texts = [self.system] if isinstance(self.system, str) else [part.text for part in self.system or ()]
        content = "\n".join(filter(None, texts))
        return [SystemMessage.model_construct(role="system", content=content)] if content else []

    def _without_billing_header(self, message: AnyMessage) -> AnyMessage | None:
        """The message without the header's line; None if a system message has no other text."""
        content = message.content if isinstance(message, SystemMessage) else None
        if not isinstance(content, str) or BILLING_HEADER not in content:
            return message
        lines = content.split("\n")
        kept = [line for line in lines if not line.startswith(BILLING_HEADER)]
        if len(kept) == len(lines):
            return message
        self._ignored.append(f"system.{BILLING_HEADER}")
        text = "\n".join(kept).strip("\n")
        return SystemMessage.model_construct(role="system", content=text) if text else None

    def _chat_fields(self) -> dict[str, Any]:
        """Fields of the chat completion that have other names here."""
        fields: dict[str, Any] = {"stop": self.stop_sequences, "continue_final_message": self._continues or None}
        if self.tools is not None:
            fields["tools"] = [tool.as_chat() if isinstance(tool, ClientTool) else tool for tool in self.tools]
        if self.tool_choice is not None:
            choice = self.tool_choice
            named = NamedTool.model_construct(function=FunctionName.model_construct(name=choice.name or ""))
            fields["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
            fields["parallel_tool_calls"] = False if choice.disable_parallel_tool_use else None
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
            fields["thinking_token_budget"] = self.thinking.budget_tokens
        if self.output_config is not None:
            fields["reasoning_effort"] = self.output_config.effort
            if format := self.output_config.format:
                schema = JsonSchema.model_construct(schema_=format.schema_)
                fields["response_format"] = JsonSchemaFormat.model_construct(type="json_schema", json_schema=schema)
        return fields

    @property
    def _continues(self) -> bool:
        """Whether the reply continues the last message: the assistant's, with a text and without calls."""
        last = self.messages[-1]
        if last.role != "assistant" or not last.content:
            return False
        return isinstance(last.content, str) or isinstance(last.content[-1], TextPart)


# Fields of the same name and meaning in a chat completion.
SAME_IN_CHAT = ("max_tokens", "temperature", "top_p", "top_k", "stream", "seed", "cache_salt", "principle_placement")
