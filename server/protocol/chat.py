"""The schema of /v1/chat/completions: OpenAI's fields that work, and ours. Any other field is an error."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from alignment_core import Principle, SamplingParams
from alignment_core.sequence import MAX_PRINCIPLES, MAX_RATIO, MAX_STOP_STRINGS


def _encodable(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text must be valid Unicode: it has half a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Ratio = Annotated[float, Field(ge=0, le=MAX_RATIO)]


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    def rendered(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class PrincipleItem(Schema):
    text: Annotated[Text, Field(min_length=1)]
    weight: Annotated[float, Field(ge=0)] = 1.0
    ratio: Ratio | None = None


class StreamOptions(Schema):
    include_usage: bool = False


class ChatCompletionRequest(Schema):
    """OpenAI's request with the alignment fields flat at the top level (`extra_body` in the SDKs)."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 or -1 switches it off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="an identifier of the end user; no effect on the reply")

    principle: Text | Annotated[list[PrincipleItem], Field(min_length=1, max_length=MAX_PRINCIPLES)] | None = None
    alignment_ratio: Ratio | None = None
    alignment_top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    alignment_temperature: Annotated[float, Field(gt=0)] | None = None
    principle_placement: Literal["system", "user"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral_values_of_unsupported_fields(cls, body: Any) -> Any:
        """Clients send defaults of fields that we do not support yet: those are fine, all else is an error."""
        if not isinstance(body, dict):
            return body
        for name, neutral in UNSUPPORTED.items():
            if name in body:
                if body[name] is not None and not _equal(body[name], neutral):
                    raise PydanticCustomError("unsupported_field", "{param} is not supported yet", {"param": name})
                body = {key: value for key, value in body.items() if key != name}
        return body

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same thing: give one")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def sampling_params(self) -> SamplingParams:
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "seed": self.seed,
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop and tuple(self.stop),
            "alignment_top_p": self.alignment_top_p,
            "alignment_temperature": self.alignment_temperature,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def principles(self, default_ratio: float) -> list[Principle]:
        ratio = default_ratio if self.alignment_ratio is None else self.alignment_ratio
        if isinstance(self.principle, str):
            return [Principle(self.principle, ratio=ratio)]
        return [
            Principle(item.text, item.weight, ratio if item.ratio is None else item.ratio)
            for item in self.principle or ()
        ]


def _equal(value: Any, neutral: Any) -> bool:
    return type(value) in (type(neutral), int) and bool(value == neutral)


# Known fields that are not supported yet, with the value that asks for nothing.
UNSUPPORTED: dict[str, Any] = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
    "response_format": {"type": "text"},
    "structured_outputs": None,
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "metadata": {},
    "store": False,
    "chat_template_kwargs": {},
    "reasoning_effort": None,
    "continue_final_message": False,
    "alignment_trace": False,
}
