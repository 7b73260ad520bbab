"""The request schemas of /tokenize and /detokenize."""

from typing import Annotated

from pydantic import Field

from linalign.server.protocol.chat_request import ChatFields
from linalign.server.protocol.generation import AlignmentFields
from linalign.server.protocol.schema import FAIL_FAST, Request, TokenId, field_error


class TokenizeRequest(ChatFields):
    """A chat or a text with alignment fields; alignment_top_p and alignment_temperature have no effect."""

    prompt: str | None = None

    def check(self) -> None:
        super().check()
        if (self.prompt is None) == (self.messages is None):
            raise field_error("prompt", "give either prompt or messages")
        if self.prompt is not None:
            for name in set(ChatFields.model_fields) - set(AlignmentFields.model_fields):
                if getattr(self, name) is not None:
                    raise field_error(name, f"{name} needs messages instead of prompt")


class DetokenizeRequest(Request):
    tokens: Annotated[list[TokenId], Field(max_length=1 << 18), FAIL_FAST]
