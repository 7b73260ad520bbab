"""The schemas of /tokenize and /detokenize."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignment_core.prompts import Rendering
from server.protocol.chat import Message, Tool
from server.protocol.generation import AlignmentFields, Schema, Text, TokenId


class TokenizeRequest(AlignmentFields):
    """A chat or a text, and what aligns it; alignment_top_p and alignment_temperature change no token."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    principle_placement: Literal["system", "user"] | None = None
    chat_template_kwargs: dict[str, str | bool | int | float] | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.prompt is not None and (self.tools or self.principle_placement or self.continue_final_message):
            raise ValueError("tools, principle_placement and continue_final_message are for messages")
        return self

    def rendering(self) -> Rendering:
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        return Rendering(tools, self.chat_template_kwargs or {}, bool(self.continue_final_message))


class DetokenizeRequest(Schema):
    model: str
    tokens: list[TokenId]
