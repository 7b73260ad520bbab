"""What the schemas of all requests share: unknown fields, and numbers in the forms that clients write."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from linalign.server.protocol.ignored_fields import ELSEWHERE, EMPTY, INSTEAD, ignored_fields


def field_error(param: str, message: str, kind: str = "invalid_value") -> PydanticCustomError:
    """An error for one field, to be raised by validators of the whole body. param: The field's name."""
    return PydanticCustomError(kind, "{message}", {"message": message, "param": param})


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unlimited(value: Any) -> Any:
    return None if value == -1 else _whole(value)


FAIL_FAST = Field(fail_fast=True)  # report only the first error of a list, because there may be millions
WHOLE = BeforeValidator(_whole)  # 16.0 is an integer in JSON Schema
UNLIMITED = BeforeValidator(_unlimited)  # -1 means no limit, as in llama.cpp
MaxTokens = Annotated[
    Annotated[int, Field(ge=1)] | None,
    UNLIMITED,
    Field(description="shortened to what the context leaves; -1: no limit"),
]
ThinkingBudget = Annotated[
    Annotated[int, Field(ge=0)] | None,
    WHOLE,
    Field(description="most tokens of reasoning; then the mark that ends the reasoning is forced"),
]
TokenId = Annotated[int, Field(ge=0)]  # not WHOLE, because prompts may have 100,000


class Schema(BaseModel):
    """An object of ours, in which unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class OpenSchema(Schema):
    """An object of OpenAI's API. Unknown fields are kept, see ignored_fields.py."""

    model_config = ConfigDict(extra="allow")


class Request(OpenSchema):
    """The body of a request."""

    model: str | None = Field(None, description="by default the model itself, without a preset")
    _ignored: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_values_of_unsupported_fields(cls, body: Any) -> Any:
        """Drop unsupported fields that clients send with a value that has no effect. Other values are an error."""
        if not isinstance(body, dict):
            return body
        refused = {**ELSEWHERE, **cls.unsupported()}
        for name in body.keys() & (refused.keys() - cls.model_fields.keys()):
            neutral = refused[name]
            if body[name] is not None and body[name] != neutral and (neutral is not None or body[name] not in EMPTY):
                hint = f"; {INSTEAD[name]}" if name in INSTEAD else ""
                raise field_error(name, f"{name} is not supported{hint}", "unsupported_field")
        return {name: value for name, value in body.items() if name in cls.model_fields or name not in refused}

    @classmethod
    def unsupported(cls) -> dict[str, Any]:
        """Fields of OpenAI's API that would change the reply and are not supported, with values that have no effect."""
        return {}

    @property
    def ignored(self) -> list[str]:
        """Fields that have no effect, as paths without indices."""
        return self._ignored

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        self._ignored = ignored_fields(self, _names_of_all_requests())
        self.check()
        return self

    def check(self) -> None:
        """Check combinations of fields. Raises PydanticCustomError, made by `field_error`."""


def _names_of_all_requests() -> set[str]:
    """All fields that an endpoint knows, whether it supports them or not."""
    requests: list[type[Request]] = [Request]
    for request in requests:
        requests += request.__subclasses__()
    return {name for request in requests for name in (*request.model_fields, *request.unsupported())}
