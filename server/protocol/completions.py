"""The request schema of /v1/completions: the reply continues a text, without a chat template."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from linalign import SamplingParams
from linalign.alignment_core.request import MAX_LOGPROBS
from linalign.server.protocol.generation import GenerationRequest
from linalign.server.protocol.schema import FAIL_FAST, WHOLE, TokenId, field_error

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # OpenAI's


def _kind(prompt: Any) -> str:
    if isinstance(prompt, list) and prompt:
        return {int: "token ids", list: "lists of token ids"}.get(type(prompt[0]), "several texts")
    return "one text"


Ids = Annotated[list[TokenId], Field(min_length=1), FAIL_FAST]
Prompts = Annotated[
    Annotated[str, Tag("one text")]
    | Annotated[list[TokenId], FAIL_FAST, Tag("token ids")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS), FAIL_FAST, Tag("several texts")]
    | Annotated[list[Ids], Field(max_length=MAX_PROMPTS), FAIL_FAST, Tag("lists of token ids")],
    Discriminator(_kind),
]


class CompletionRequest(GenerationRequest):
    """OpenAI's request, with the alignment fields. A principle is a line of text before the prompt."""

    prompt: Prompts
    max_tokens: Annotated[int, WHOLE, Field(ge=-1)] | None = Field(
        None,
        description="shortened to what the context leaves (default: 16); -1: no limit; 0 needs echo: no new tokens",
    )
    echo: bool | None = Field(
        None, description="the reply starts with the prompt; with logprobs, also with its log-probabilities"
    )
    logprobs: Annotated[int, WHOLE, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @classmethod
    def unsupported(cls) -> dict[str, Any]:
        return {"suffix": "", "best_of": 1}

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "max_tokens 0 needs echo: true")

    @property
    def scores(self) -> bool:
        """Whether the prompt's log-probabilities are requested."""
        return bool(self.echo) and self.logprobs is not None

    def prompts(self) -> list[str | list[int]]:
        """All prompts, each as text or as token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def sampling_params(self, **more: Any) -> SamplingParams:
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        given = {"max_tokens": None if max_tokens < 0 else max_tokens, "logprobs": self.logprobs, "trace": self.traces}
        return super().sampling_params(**{**given, **more})

    @property
    def traces(self) -> bool:
        """Whether replies have a trace. By default, only scored texts do."""
        return self.scores if self.alignment_trace is None else self.alignment_trace
