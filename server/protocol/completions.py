"""The schema of /v1/completions: text goes on, without any chat template."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from linalign import SamplingParams
from linalign.alignment_core.request import MAX_LOGPROBS
from linalign.server.protocol.generation import FIRST, GenerationRequest, TokenId, refused

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # OpenAI's


def _kind(prompt: Any) -> str:
    if isinstance(prompt, list) and prompt:
        return {int: "token ids", list: "lists of token ids"}.get(type(prompt[0]), "several texts")
    return "one text"


Ids = Annotated[list[TokenId], Field(min_length=1), FIRST]
Prompts = Annotated[
    Annotated[str, Tag("one text")]
    | Annotated[list[TokenId], FIRST, Tag("token ids")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS), FIRST, Tag("several texts")]
    | Annotated[list[Ids], Field(max_length=MAX_PROMPTS), FIRST, Tag("lists of token ids")],
    Discriminator(_kind),
]


class CompletionRequest(GenerationRequest):
    """OpenAI's request with the alignment fields. A principle stands before the prompt, as text of its own line."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="0 with echo and logprobs: nothing new")
    echo: bool | None = Field(None, description="begin with the prompt; with logprobs, with its log-probabilities")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @classmethod
    def unsupported(cls) -> dict[str, Any]:
        return {"suffix": "", "best_of": 1, "store": False}

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "max_tokens 0 needs echo: true")

    @property
    def scores(self) -> bool:
        """Whether the prompt's own log-probabilities are asked for."""
        return bool(self.echo) and self.logprobs is not None

    def prompts(self) -> list[str | list[int]]:
        """One or several, each as text or as token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def sampling_params(self, **more: Any) -> SamplingParams:
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return super().sampling_params(max_tokens=max_tokens, logprobs=self.logprobs, trace=self.traces, **more)

    @property
    def traces(self) -> bool:
        """A text that is scored has a trace unless none is wanted."""
        return self.scores if self.alignment_trace is None else self.alignment_trace
