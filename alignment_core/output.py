"""What users get back: outputs, log-probabilities, usage, and the numbers of the engine. Free of torch."""

import time
from dataclasses import dataclass, field
from typing import Literal

from linalign.alignment_core.errors import InvalidRequest, RequestFailed
from linalign.alignment_core.request import Prompt

IMPOSSIBLE = -9999.0  # the log-probability of a token that can't be drawn, where −inf can't be sent
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Times:
    """When things happened to a sequence, in seconds of time.monotonic(); 0 for what has not happened."""

    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0  # its first step was planned
    first_token: float = 0.0

    def later(self, seconds: float) -> "Times":
        """The same times on a clock that is ahead by this many seconds."""
        known = (self.submitted, self.admitted, self.first_token)
        return Times(*(when and when + seconds for when in known))


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of a choice: the user's view first, then the work behind it."""

    prompt_tokens: int  # of the first principled branch
    prompt_cached_tokens: int  # the part that prefix reuse saved
    completion_tokens: int
    branches: int
    branch_tokens_computed: int  # tokens computed, of all branches
    extra_tokens_computed: int  # the part of all branches except the first
    prefix_cached_tokens: int  # tokens that prefix reuse spared, of all branches


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine at one moment, and its counts since it was made."""

    num_running: int  # sequences
    num_waiting: int  # sequences
    kv_cache_usage: float  # share of the pages that branches hold, 0 to 1
    num_preemptions: int
    num_tokens_admitted: int  # context tokens at admission, of all branches
    num_tokens_cached: int  # context tokens that prefix reuse spared, after admission too
    num_tokens_drafted: int  # by speculation, counted once for a sequence
    num_tokens_accepted: int  # the part that was drawn
    num_tokens_generated: int  # of all replies, without given tokens, counted once for a sequence


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a token under a policy."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the most probable tokens with their log-probabilities, best first
    trace: "Trace | None" = None  # of an aligned token, if the request has trace


@dataclass(frozen=True, slots=True)
class Trace:
    """The two policies behind an aligned token."""

    principled: TokenLogprob
    base: TokenLogprob
    num_plausible: int  # tokens that could have been drawn
    kl: float  # KL(aligned ∥ base) of this token, in nats, at temperature 1


@dataclass(frozen=True, slots=True)
class Output:
    """The part of a choice that one step adds. The last one has a finish_reason, a usage and times."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    error: InvalidRequest | RequestFailed | None = None  # with "error"; None if the engine itself failed
    times: Times | None = None
    stop_string: str | None = None  # of the last output: the stop string that has ended the reply


def terminal_output(prompt: Prompt, choice: int, reason: FinishReason, num_tokens: int = 0) -> Output:
    """The last output of a choice that no engine has computed, or of which only the number of tokens is known."""
    num_prompt_tokens = len(prompt.principled[0]) + len(prompt.given)
    usage = Usage(num_prompt_tokens, 0, num_tokens, len(prompt.branches), 0, 0, 0)
    return Output("", (), reason, usage, choice, times=Times())
