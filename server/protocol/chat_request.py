"""The request schema of /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import Field

from linalign import SamplingParams
from linalign.alignment_core.request import MAX_LOGPROBS
from linalign.alignment_core.text.chat_template import Rendering
from linalign.server.protocol.chat_messages import Message, rendered
from linalign.server.protocol.generation import AlignmentFields, GenerationRequest
from linalign.server.protocol.schema import FAIL_FAST, WHOLE, MaxTokens, ThinkingBudget, field_error
from linalign.server.protocol.tools import MAX_TOOLS, AnyTool, Function, FunctionName, NamedTool, OtherTool, Tool
from linalign.server.reasoning import Effort


class ChatFields(AlignmentFields):
    """The fields from which the chat template renders a prompt."""

    messages: Annotated[list[Message], Field(min_length=1), FAIL_FAST] | None = None
    principle_placement: Literal["system", "user"] | None = None
    chat_template_kwargs: dict[str, str | bool | int | float | None] | None = Field(
        None, description="variables for the model's chat template; those that it does not use are ignored"
    )
    reasoning_effort: Effort | None = Field(None, description="for chat templates that use it, otherwise ignored")
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS), FAIL_FAST] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS), FAIL_FAST] | None = Field(
        None, description="OpenAI's earlier form of tools"
    )
    function_call: Literal["none", "auto"] | FunctionName | None = Field(
        None, description="OpenAI's earlier form of tool_choice"
    )
    continue_final_message: bool | None = Field(
        None, description="continue the last message, which must be the assistant's"
    )
    add_generation_prompt: bool | None = Field(None, description="false requires continue_final_message")

    def check(self) -> None:
        super().check()
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise field_error(
                "add_generation_prompt", "add_generation_prompt must be the opposite of continue_final_message"
            )
        if self.functions and self.tools:
            raise field_error("functions", "functions and tools mean the same: give one of them")
        if self.requires_call and not self.callable_tools():
            field = "tool_choice" if self.function_call is None else "function_call"
            raise field_error(field, f"{field} requires a call, but there is no such function")
        self._ignored += dict.fromkeys(f"tools.{tool.type}" for tool in self.tools or () if isinstance(tool, OtherTool))

    @property
    def choice(self) -> str | None:
        """none, auto or required; with a named function, required."""
        choice = self.function_call if self.tool_choice is None else self.tool_choice
        return choice if isinstance(choice, str) or choice is None else "required"

    @property
    def requires_call(self) -> bool:
        return self.choice == "required"

    @property
    def named_function(self) -> str | None:
        """The function that must be called."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        return self.function_call.name if isinstance(self.function_call, FunctionName) else None

    def callable_tools(self) -> list[dict[str, Any]]:
        """The functions that the reply may call, in OpenAI's form."""
        if self.choice == "none":
            return []
        functions = [tool.function for tool in self.tools or () if isinstance(tool, Tool)] or self.functions or []
        return [one.as_openai() for one in functions if self.named_function in (None, one.name)]

    def rendered_messages(self) -> list[dict[str, Any]]:
        """The messages in the form that chat templates expect."""
        return rendered(self.messages or ())

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
    max_completion_tokens: MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, WHOLE, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    thinking_token_budget: ThinkingBudget = None
    parallel_tool_calls: bool | None = Field(None, description="false keeps only the first call")

    @classmethod
    def unsupported(cls) -> dict[str, Any]:
        return {
            "modalities": ["text"],
            "audio": None,
            "moderation": None,
            "best_of": 1,
        }

    @property
    def parallel(self) -> bool:
        """Whether a reply may have several calls."""
        return self.parallel_tool_calls is not False and not self.functions

    @property
    def max_tokens_field(self) -> str:
        """The field that the client has used for the longest reply."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def check(self) -> None:
        super().check()
        if self.max_completion_tokens not in (None, self.max_tokens) and self.max_tokens is not None:
            raise field_error("max_tokens", "max_tokens and max_completion_tokens mean the same: give one of them")
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs needs logprobs: true")

    def sampling_params(self, **more: Any) -> SamplingParams:
        num_top = (self.top_logprobs or 0) if self.logprobs else None
        max_tokens = self.max_completion_tokens or self.max_tokens
        return super().sampling_params(**{"max_tokens": max_tokens, "logprobs": num_top, **more})
