"""Facts about one HTTP request that middlewares log, count or limit."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.types import Scope

from linalign import Output, Prompt
from linalign.server.core_errors import code_of


class KeyBusy(Exception):
    """An API key has reached a limit. code: Of the error. wait: Seconds until a retry may succeed."""

    def __init__(self, message: str, code: str, wait: float) -> None:
        super().__init__(message)
        self.code, self.wait = code, wait


@dataclass(frozen=True, slots=True)
class Applied:
    """What a request is aligned with, and where that comes from: body, headers, model or key."""

    principle_from: str
    ratio_from: str  # "default" if no source has a ratio
    ratios: list[float]  # of each principle
    method: str

    def details(self) -> dict[str, Any]:
        """The fields of `usage.alignment_details`."""
        return asdict(self)

    def header(self) -> str:
        """The response header's value, a dictionary of RFC 9651."""
        ratios = " ".join(str(round(ratio, 3)) for ratio in self.ratios)
        return f"principle={self.principle_from}, ratio=({ratios});from={self.ratio_from}, method={self.method}"


@dataclass(slots=True)
class Exchange:
    """Filled while the request is processed. Counts are the user's view, of all prompts and choices together."""

    began: float = field(default_factory=time.monotonic)
    key: bytes | None = None  # the hash of the API key; None if no key is needed
    admit: Callable[[int], None] = lambda _: None  # call before choices are submitted; raises KeyBusy, InvalidRequest
    leave: Callable[[int], None] = lambda _: None  # call for choices that have ended
    charge: Callable[[int], None] = lambda _: None  # takes tokens, of all branches, from the key's allowance
    error_code: str | None = None  # of the response
    applied: Applied | None = None  # what the request is aligned with
    ignored: list[str] = field(default_factory=list)  # paths of fields without an effect
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def count_prompt(self, prompt: Prompt) -> None:
        """Count a prompt that the engine has accepted."""
        self.num_prompt_tokens += len(prompt.principled[0]) + len(prompt.given)
        self.charge(sum(len(ids) + len(prompt.given) for ids in prompt.branches))

    def count_output(self, output: Output) -> None:
        """Count the end of a choice."""
        if output.finish_reason and output.usage:
            self.leave(1)
            self.finish_reasons.append(output.finish_reason)
            self.num_completion_tokens += output.usage.completion_tokens
            self.charge(output.usage.completion_tokens * output.usage.branches)
            if output.finish_reason == "error":
                self.error_code = code_of(output.error)


def exchange_of(scope: Scope) -> Exchange:
    """The Exchange of a request, made at the first call."""
    exchange: Exchange = scope.setdefault("state", {}).setdefault("exchange", Exchange())
    return exchange
