"""Request fields that the endpoints share: sampling, alignment, stop conditions, streaming."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from linalign import Principle, SamplingParams
from linalign.alignment_core.decoding.schemas import MAX_LENGTH
from linalign.alignment_core.methods import Method
from linalign.alignment_core.request import (
    MAX_BIAS,
    MAX_PENALTY,
    MAX_PRINCIPLES,
    MAX_RATIO,
    MAX_REPETITION,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MIN_RATIO,
    MIN_REPETITION,
    MIN_SEED,
    Structure,
)
from linalign.server.protocol.schema import (
    FAIL_FAST,
    WHOLE,
    MaxTokens,
    OpenSchema,
    Request,
    Schema,
    TokenId,
    field_error,
)
from linalign.server.protocol.strict_json import InvalidBody, strict

Ratio = Annotated[float, Field(ge=MIN_RATIO, le=MAX_RATIO)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
Seed = Annotated[int, WHOLE, Field(ge=MIN_SEED, le=MAX_SEED)]
# OpenAI's bounds, because metadata is returned with every event of a response.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
CacheSalt = Annotated[
    str, Field(min_length=1, max_length=256, description="prefixes are shared only with requests of the same salt")
]


class PrincipleItem(Schema):
    text: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(ge=0)] = 1.0
    ratio: Ratio | None = None


class StreamOptions(OpenSchema):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="usage in every chunk; needs include_usage")


class TextFormat(OpenSchema):
    type: Literal["text"]


class JsonObjectFormat(OpenSchema):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="as in llama.cpp")

    def structure(self, field: str) -> Structure:
        return Structure("json_schema", json.dumps({"type": "object"} if self.schema_ is None else self.schema_), field)


class JsonSchema(OpenSchema):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="no effect: replies always follow the schema")
    description: str | None = None


class JsonSchemaFormat(OpenSchema):
    type: Literal["json_schema"]
    json_schema: JsonSchema

    def structure(self, field: str) -> Structure:
        return Structure("json_schema", json.dumps(self.json_schema.schema_), field)


class StructuredOutputs(Schema):
    """A constraint on the reply. Exactly one of these fields is set."""

    json_: str | dict[str, Any] | None = Field(None, alias="json", description="a JSON schema, or its text")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1), FAIL_FAST] | None = None
    grammar: str | None = Field(None, description="Lark or GBNF")

    @model_validator(mode="after")
    def _has_exactly_one(self) -> "StructuredOutputs":
        if (
            sum(value is not None for value in (self.json_, self.json_object, self.regex, self.choice, self.grammar))
            != 1
        ):
            raise ValueError("give exactly one of json, json_object, regex, choice and grammar")
        if isinstance(self.json_, str):
            if len(self.json_) > MAX_LENGTH:
                raise ValueError(f"json has {len(self.json_)} characters, more than {MAX_LENGTH}")
            try:
                schema = strict(self.json_)
            except (ValueError, InvalidBody) as error:
                raise ValueError(f"json is not valid JSON: {error}") from error
            if not isinstance(schema, dict):
                raise ValueError("json must be a schema, an object")
            self.json_ = schema  # whatever its spelling was
        return self

    def structure(self) -> Structure:
        name = "structured_outputs"
        if self.json_ is not None or self.json_object:
            return Structure("json_schema", json.dumps({"type": "object"} if self.json_ is None else self.json_), name)
        if self.regex is not None:
            return Structure("regex", self.regex, name)
        if self.choice is not None:
            return Structure("choice", json.dumps(self.choice), name)
        return Structure("grammar", self.grammar or "", name)


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Alignment(Schema):
    """The fields that a principle needs, shared by requests and presets."""

    principle: str | Annotated[list[PrincipleItem], Field(min_length=1, max_length=MAX_PRINCIPLES)] | None = None
    alignment_method: Annotated[
        Method | None, Field(description="how the policies are combined, see docs/methods.md")
    ] = None
    alignment_ratio: Ratio | None = None
    alignment_top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    alignment_temperature: Annotated[float, Field(gt=0)] | None = None


class Preset(Alignment):
    """A preset of a YAML file: defaults for these fields of a request."""

    description: str | None = None
    principle_placement: Literal["system", "user"] | None = None


class AlignmentFields(Request, Alignment):
    """The alignment fields of a request."""

    model_config = ConfigDict(extra="allow")

    def principles(self, default_ratio: float) -> list[Principle]:
        ratio = default_ratio if self.alignment_ratio is None else self.alignment_ratio
        if isinstance(self.principle, str):
            return [Principle(self.principle, ratio=ratio)]
        return [
            Principle(item.text, item.weight, ratio if item.ratio is None else item.ratio)
            for item in self.principle or ()
        ]


class GenerationRequest(AlignmentFields):
    """Fields of /v1/chat/completions and /v1/completions. Fields that OpenAI does not have are also at the top level
    (`extra_body` in the SDKs).
    """

    n: Annotated[int, WHOLE, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="0: the most probable token")
    top_k: Annotated[int, WHOLE, Field(ge=-1)] | None = Field(None, description="0 or -1: no limit")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    max_tokens: MaxTokens = None
    min_tokens: Annotated[int, WHOLE, Field(ge=0)] | None = Field(
        None, description="a complete structured reply may be shorter"
    )
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], FAIL_FAST] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION, le=MAX_REPETITION)] | None = None
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] | None
    ) = Field(None, description="maps token ids to numbers that are added to their logits")
    alignment_trace: bool | None = Field(None, description="report each token's log-probabilities under all policies")
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="an identifier of the end user; no effect on the reply")
    cache_salt: CacheSalt | None = None

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and not self.stream:
            self._ignored.append("stream_options")
        if self.user is not None:
            self._ignored.append("user")
        if self.structured_outputs is not None and not isinstance(self.response_format, TextFormat | None):
            raise field_error("structured_outputs", "structured_outputs and response_format exclude each other")

    def sampling_params(self, **more: Any) -> SamplingParams:
        """The sampling parameters. more: Values of parameters that the endpoint names differently. Raises
        InvalidRequest.
        """
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p or None,
            "top_k": 1 if self.top_p == 0 else None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "stop": (self.stop,) if isinstance(self.stop, str) else _or_none(tuple, self.stop),
            "stop_token_ids": _or_none(frozenset, self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias and {int(id): bias for id, bias in self.logit_bias.items()},
            "structure": self.structure(),
            "trace": self.alignment_trace,
            "alignment_top_p": self.alignment_top_p,
            "alignment_temperature": self.alignment_temperature,
            **more,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})

    def structure(self) -> Structure | None:
        if self.structured_outputs:
            return self.structured_outputs.structure()
        if isinstance(self.response_format, JsonObjectFormat | JsonSchemaFormat):
            return self.response_format.structure("response_format")
        return None


def _or_none(make: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else make(value)
