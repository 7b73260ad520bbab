"""The functions that a reply may call, as clients send them."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from linalign.server.protocol.schema import OpenSchema

MAX_TOOLS = 1024


class Function(OpenSchema):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="calls follow the schema; calls that tool_choice requires always do")

    @model_validator(mode="after")
    def _has_object_schema(self) -> Self:
        if self.parameters is not None and self.parameters.get("type", "object") != "object":
            raise ValueError("parameters must be the schema of an object")
        return self

    def as_openai(self) -> dict[str, Any]:
        """The tool in OpenAI's form, without fields that have no effect."""
        known = {name: getattr(self, name) for name in Function.model_fields}
        return {"type": "function", "function": {name: value for name, value in known.items() if value is not None}}


class Tool(OpenSchema):
    type: Literal["function"]
    function: Function


class OtherTool(OpenSchema):
    """A tool of another type, which this server can't run. It is ignored."""

    model_config = ConfigDict(extra="ignore")
    type: str


def kind_of_tool(tool: Any) -> str:
    """The tag of a tool in the union of functions and others."""
    if isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function":
        return "other tool"
    return "function tool"


AnyTool = Annotated[
    Annotated[Tool, Tag("function tool")] | Annotated[OtherTool, Tag("other tool")], Discriminator(kind_of_tool)
]


class FunctionName(OpenSchema):
    name: str


class NamedTool(OpenSchema):
    type: Literal["function"]
    function: FunctionName
