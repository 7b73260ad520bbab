"""The schemas of /tokenize and /detokenize."""

from typing import Annotated

from pydantic import Field

from linalign.server.protocol.chat_request import ChatFields
from linalign.server.protocol.generation import FIRST, AlignmentFields, Schema, TokenId, refused


class TokenizeRequest(ChatFields):
    """A chat or a text, and what aligns it; alignment_top_p and alignment_temperature change no token."""

    prompt: str | None = None

    def check(self) -> None:
        super().check()
        if (self.prompt is None) == (self.messages is None):
            raise refused("prompt", "give either prompt or messages")
        if self.prompt is not None:
            for name in set(ChatFields.model_fields) - set(AlignmentFields.model_fields):
                if getattr(self, name) is not None:
                    raise refused(name, f"{name} is for messages, not for a prompt")


class DetokenizeRequest(Schema):
    model: str
    tokens: Annotated[list[TokenId], Field(max_length=1 << 18), FIRST]
