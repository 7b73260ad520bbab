"""What happens in one HTTP request, for those who log it, count it or limit it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

from linalign import Output, Prompt
from linalign.server.protocol.core_errors import code_of


class KeyBusy(Exception):
    """An API key has used up what it may. code: of the error. wait: seconds until it is worth another try."""

    def __init__(self, message: str, code: str, wait: float) -> None:
        super().__init__(message)
        self.code, self.wait = code, wait


@dataclass(slots=True)
class Exchange:
    """Filled as the request goes on.

    began: seconds of time.monotonic(). key: the API key's hash, None where none is asked for. admit: to be asked before
    so many choices are submitted, raises KeyBusy, InvalidRequest; leave: of choices that have ended. charge: takes
    tokens, of every branch, from what the key may still use. error_code: that of the response. The counts are the
    user's view, all prompts and choices together.
    """

    began: float = field(default_factory=time.monotonic)
    key: bytes | None = None
    admit: Callable[[int], None] = lambda _: None
    leave: Callable[[int], None] = lambda _: None
    charge: Callable[[int], None] = lambda _: None
    error_code: str | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def ask(self, prompt: Prompt) -> None:
        """The engine has taken the prompt in."""
        self.num_prompt_tokens += len(prompt.principled[0]) + len(prompt.given)
        self.charge(sum(len(ids) + len(prompt.given) for ids in prompt.branches))

    def take(self, output: Output) -> None:
        """What came of it."""
        if output.finish_reason and output.usage:
            self.leave(1)
            self.finish_reasons.append(output.finish_reason)
            self.num_completion_tokens += output.usage.completion_tokens
            self.charge(output.usage.completion_tokens * output.usage.branches)
            if output.finish_reason == "error":
                self.error_code = code_of(output.error)


def exchange_of(scope: Scope) -> Exchange:
    """The request's own; who asks first makes it."""
    exchange: Exchange = scope.setdefault("state", {}).setdefault("exchange", Exchange())
    return exchange
