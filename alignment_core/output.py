"""What a request gets: outputs, their log-probabilities and usage; and the engine's numbers. Free of torch."""

import time
from dataclasses import dataclass, field
from typing import Literal

from linalign.alignment_core.errors import InvalidRequest, RequestFailed
from linalign.alignment_core.request import Prompt

IMPOSSIBLE = -9999.0  # the log-probability of what can't be drawn, where −inf can't be told
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Times:
    """When what happened to a sequence, in seconds of time.monotonic(); 0 for what has not."""

    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0

    def later(self, seconds: float) -> "Times":
        """The same on a clock that is ahead by so much."""
        known = (self.submitted, self.admitted, self.first_token)
        return Times(*(when and when + seconds for when in known))


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took: the user's view of it, and the work behind.

    prompt_cached_tokens: of the first principled branch, from what others have computed. extra_tokens_computed: of
    branch_tokens_computed, those of all branches but the first.
    """

    prompt_tokens: int
    prompt_cached_tokens: int
    completion_tokens: int
    branches: int
    branch_tokens_computed: int
    extra_tokens_computed: int
    prefix_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine at one moment: sequences, the share of pages held, and counts since it was made.

    num_tokens_admitted: context tokens of all branches at admission. num_tokens_cached: those of them
    (and of what other branches computed meanwhile) that prefix reuse spared. num_tokens_drafted,
    num_tokens_accepted: of speculation, once a sequence. num_tokens_generated: of all replies, once a
    sequence, without given text.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_preemptions: int
    num_tokens_admitted: int
    num_tokens_cached: int
    num_tokens_drafted: int
    num_tokens_accepted: int
    num_tokens_generated: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable a policy holds a token. top: the most probable ones with their log-probabilities, best first.
    trace: of what an aligned reply's policy was made, if asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    trace: "Trace | None" = None


@dataclass(frozen=True, slots=True)
class Trace:
    """What the two policies make of an aligned token. num_plausible: tokens that could have come. kl: KL(aligned ∥
    base) at this step, in nats, at temperature 1.
    """

    principled: TokenLogprob
    base: TokenLogprob
    num_plausible: int
    kl: float


@dataclass(frozen=True, slots=True)
class Output:
    """One step's news of a choice. Its last one has a finish_reason, the usage, and the times.

    error: with the finish_reason "error", why this request can't be served; None where the engine itself failed.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    error: InvalidRequest | RequestFailed | None = None
    times: Times | None = None


def terminal_output(prompt: Prompt, choice: int, reason: FinishReason, num_tokens: int = 0) -> Output:
    """The last output of a choice that no engine has computed, or of which only the number of tokens is known."""
    num_prompt_tokens = len(prompt.principled[0]) + len(prompt.given)
    usage = Usage(num_prompt_tokens, 0, num_tokens, len(prompt.branches), 0, 0, 0)
    return Output("", (), reason, usage, choice, times=Times())
