"""What is asked for and what is being generated: parameters, branches, sequences, outputs."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from alignment_core.alignment import METHODS, Coefficients, Method
from alignment_core.detokenizer import TextStream
from alignment_core.speculation import PromptLookup

if TYPE_CHECKING:
    from llguidance import LLMatcher

FinishReason = Literal["stop", "length", "abort", "error"]

MIN_RATIO, MAX_RATIO = -10.0, 20.0
MAX_STOP_STRINGS = 16
MAX_PRINCIPLES = 16
MAX_LOGPROBS = 20
MAX_BIASES = 1024


class InvalidRequest(ValueError):
    """A request that can never be served. `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestFailed(RuntimeError):
    """Something went wrong in one request; no other is harmed."""


def _require(condition: bool, param: str, rule: str, value: object) -> None:
    if not condition:
        raise InvalidRequest(f"{param} must be {rule}, got {value!r}", param)


@dataclass(frozen=True, slots=True)
class Structure:
    """What a reply must look like.

    text: a JSON schema; a regular expression that matches all of it; a JSON list of strings to choose from;
    a grammar in Lark or GBNF; "lark": in llguidance's own form, which may hold JSON schemas. param: the name of
    the request's field, for error messages. after: a mark, in Lark, up to which the reply may be anything.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar", "lark"]
    text: str
    param: str = "structured_outputs"
    after: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are drawn. Raises InvalidRequest when a value is out of range.

    temperature: ≥ 0; 0 takes the best token. top_p: (0, 1]. top_k: 0 switches it off. min_p: [0, 1].
    seed: 64-bit; None draws a fresh one. max_tokens: None means up to the context's end.
    stop: strings that end the reply and are not part of it. stop_token_ids: tokens that do, beside the
    model's own end-of-sequence ids, which ignore_eos leaves out. min_tokens: before so many nothing but
    max_tokens ends it.
    presence_penalty, frequency_penalty: [-2, 2], subtracted from the logits of tokens that the reply has,
    once and as often as it has them. repetition_penalty: [0.01, 10], divides the positive and multiplies the
    negative logits of tokens that the prompt or the reply has (Keskar et al., "CTRL", 2019). logit_bias:
    token id to what is added to its logit, [-100, 100]. All of these are edits of the principled logits,
    DESIGN section 2.1.
    skip_special_tokens: leave control tokens out of the text.
    structure: what the reply must look like; tokens that would break it are edited out.
    logprobs: how many alternatives to report with every token; None reports nothing. trace: report what
    the principled and the base policy make of it too.
    alignment_top_p, alignment_temperature: the plausible set, DESIGN section 2.4; None means the method's
    own mass, and a temperature of max(temperature, 0.5).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True
    structure: Structure | None = None
    logprobs: int | None = None
    trace: bool = False
    alignment_top_p: float | None = None
    alignment_temperature: float | None = None

    def __post_init__(self) -> None:
        mass, t_p = self.alignment_top_p, self.alignment_temperature
        for name in ("top_k", "seed", "max_tokens", "min_tokens", "logprobs"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, int), name, "a whole number", value)
        _require(isinstance(self.stop, tuple), "stop", "a tuple of strings", self.stop)
        _require(0 <= self.temperature < 1e30, "temperature", "in [0, 1e30)", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(self.top_k >= 0, "top_k", "≥ 0", self.top_k)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer", self.seed)
        _require(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "≥ 0", self.max_tokens)
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings", len(self.stop))
        _require(all(self.stop), "stop", "free of empty strings", self.stop)
        _require(self.min_tokens >= 0, "min_tokens", "≥ 0", self.min_tokens)
        if self.max_tokens is not None:
            _require(self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens", self.min_tokens)
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, "in [-2, 2]", getattr(self, name))
        _require(0.01 <= self.repetition_penalty <= 10, "repetition_penalty", "in [0.01, 10]", self.repetition_penalty)
        _require(len(self.logit_bias) <= MAX_BIASES, "logit_bias", f"at most {MAX_BIASES} tokens", len(self.logit_bias))
        for bias in self.logit_bias.values():
            _require(-100 <= bias <= 100, "logit_bias", "in [-100, 100]", bias)
        most = self.logprobs or 0
        _require(0 <= most <= MAX_LOGPROBS, "top_logprobs", f"in [0, {MAX_LOGPROBS}]", self.logprobs)
        _require(mass is None or 0 < mass <= 1, "alignment_top_p", "in (0, 1]", mass)
        _require(t_p is None or 0 < t_p < math.inf, "alignment_temperature", "a finite number > 0", t_p)

    @property
    def plausible_temperature(self) -> float:
        return max(self.temperature, 0.5) if self.alignment_temperature is None else self.alignment_temperature

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def num_reported(self) -> int | None:
        """Alternatives that the report of a token has; None where there is no report."""
        return 0 if self.trace and self.logprobs is None else self.logprobs

    @property
    def edits(self) -> bool:
        """Whether the principled logits are changed at all."""
        return bool(self.penalises or self.logit_bias or self.min_tokens or self.structure)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids of every branch of a request.

    principled: k ≥ 1 branches, mixed with `weights` (which sum to 1) and extrapolated by `ratios`, which a
    method makes `coefficients` of. base: the branch without any principle; None when every coefficient is 0,
    as there is no direction then. A plain request is one principled branch with weight 1 and ratio 0.
    given: what the reply begins with, whatever would have been drawn; for the log-probabilities of a text.
    continues: the reply goes on with the prompt's text. salt: 32 bytes, or none; prefixes are shared with prompts of
    the same salt alone, so that nobody else can tell by the time it takes what has been asked.
    """

    principled: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] = (1.0,)
    ratios: tuple[float, ...] = (0.0,)
    base: tuple[int, ...] | None = None
    given: tuple[int, ...] = ()
    continues: bool = False
    salt: bytes = b""
    method: Method = "linear"
    coefficients: Coefficients = field(init=False)

    def __post_init__(self) -> None:
        assert len(self.principled) == len(self.weights) == len(self.ratios) > 0
        assert math.isclose(sum(self.weights), 1.0)
        object.__setattr__(self, "coefficients", METHODS[self.method].coefficients(self.weights, self.ratios))
        assert (self.base is None) == (not any(self.coefficients))

    @property
    def follows_logits(self) -> bool:
        """Whether the logits themselves tell how they are mixed, or those before them."""
        return self.method in ("adaptive", "opad")

    @property
    def branches(self) -> tuple[tuple[int, ...], ...]:
        """Principled branches first, the base branch last."""
        return self.principled if self.base is None else (*self.principled, self.base)


@dataclass(slots=True)
class Branch:
    """One token context and its pages. Tokens [0, num_computed) have their keys and values in the pool."""

    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_computed: int = 0
    salt: bytes = b""

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.num_computed


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


def nothing_of(prompt: Prompt, choice: int, reason: FinishReason, num_tokens: int = 0) -> Output:
    """The end of a choice that no engine has computed, or of which nothing but the number of its tokens is known."""
    num_prompt_tokens = len(prompt.principled[0]) + len(prompt.given)
    usage = Usage(num_prompt_tokens, 0, num_tokens, len(prompt.branches), 0, 0, 0)
    return Output("", (), reason, usage, choice, times=Times())


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice being generated: its branches, its parameters, and what has been drawn so far.

    matcher: where the reply is in its structure. is_queued: it has not run yet. directions: OPAD's latest, by
    position. counts: how often the reply has each token. seen: the tokens of reply and principled prompts.
    """

    request_id: int
    prompt: Prompt
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    text: TextStream
    on_output: Callable[[Output], None]
    choice: int = 0
    matcher: "LLMatcher | None" = None
    branches: list[Branch] = field(init=False)
    output_ids: list[int] = field(default_factory=list)
    num_tokens_computed: int = 0
    num_tokens_extra: int = 0
    num_tokens_cached: int = 0
    num_prompt_cached: int = 0
    last_turn: int = 0
    was_preempted: bool = False
    is_queued: bool = True
    ended: bool = False
    counts: Counter[int] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)
    lookup: PromptLookup = field(init=False)
    directions: dict[int, Tensor] = field(default_factory=dict)
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        self.branches = [Branch(list(ids), salt=self.prompt.salt) for ids in self.prompt.branches]
        self.lookup = PromptLookup(self.branches[0].tokens)
        if self.params.repetition_penalty != 1:
            self.seen.update(*self.prompt.principled, self.prompt.given)

    def unwanted_ends(self, position: int) -> frozenset[int]:
        """The tokens that must not come after so many of the reply, if others may."""
        if position < self.params.min_tokens:
            return self.stop_token_ids | (self.eos_token_ids if self.matcher is not None else frozenset())
        return self.eos_token_ids if self.params.ignore_eos and self.matcher is not None else frozenset()

    @property
    def num_prompt_tokens(self) -> int:
        """Of all branches, what is given included."""
        return sum(len(ids) for ids in self.prompt.branches) + len(self.prompt.given)

    @property
    def follows_reply(self) -> bool:
        """Whether the next draw depends on more of the reply than the branches' contexts tell the model."""
        return self.params.penalises or self.matcher is not None or bool(self.remaining_given)

    @property
    def remaining_given(self) -> tuple[int, ...]:
        return self.prompt.given[len(self.output_ids) :]

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token of each branch is left to compute."""
        return all(branch.remaining == 1 for branch in self.branches)

    @property
    def num_drawn(self) -> int:
        """Tokens after the prompt, the one that is being drawn included."""
        return len(self.branches[0].tokens) - len(self.prompt.principled[0])

    @property
    def num_replied(self) -> int:
        """Tokens that were not given; negative as long as more are to be."""
        return len(self.output_ids) - len(self.prompt.given)

    def expect(self, place: int) -> None:
        """The step that has been launched draws the next token: until it is known, −1 − place stands for it."""
        for branch in self.branches:
            branch.tokens.append(-1 - place)

    def append(self, token_id: int) -> None:
        """DESIGN section 2.6: the one token that was drawn goes to every branch, in the place kept for it if any."""
        for branch, prompt in zip(self.branches, self.prompt.branches, strict=True):
            place = len(prompt) + len(self.output_ids)
            branch.tokens[place : place + 1] = [token_id]
        self.output_ids.append(token_id)
        self.directions.pop(self.num_replied - 2, None)  # the next draw needs the one before it
        if self.num_replied > 0:
            self.counts[token_id] += 1
            self.seen.add(token_id)

    def last_output(self, reason: FinishReason, news: Output | None = None) -> Output:
        """news: of the last token, if there is any."""
        usage = Usage(
            prompt_tokens=len(self.prompt.principled[0]) + len(self.prompt.given),
            prompt_cached_tokens=self.num_prompt_cached,
            completion_tokens=max(self.num_replied, 0),
            branches=len(self.branches),
            branch_tokens_computed=self.num_tokens_computed,
            extra_tokens_computed=self.num_tokens_extra,
            prefix_cached_tokens=self.num_tokens_cached,
        )
        news = news or Output("", choice=self.choice)
        return replace(news, finish_reason=reason, usage=usage, times=self.times)
