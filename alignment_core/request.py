"""What is asked for: principles, the token ids of every branch, and how tokens are drawn. Free of torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from linalign.alignment_core.decoding.methods import METHODS, Coefficients, Method
from linalign.alignment_core.errors import InvalidRequest

MIN_RATIO, MAX_RATIO = -10.0, 20.0
DEFAULT_RATIO = 2.0
MAX_STOP_STRINGS = 16
MAX_PRINCIPLES = 16
MAX_LOGPROBS = 20
MAX_BIASES = MAX_STOP_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Principle:
    """A preference in plain words. Raises InvalidRequest. `weight` is relative to the other principles'."""

    text: str
    weight: float = 1.0
    ratio: float = DEFAULT_RATIO

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InvalidRequest("principle must not be empty", "principle")
        if not MIN_RATIO <= self.ratio <= MAX_RATIO:
            limits = f"[{MIN_RATIO:g}, {MAX_RATIO:g}]"
            raise InvalidRequest(f"alignment_ratio must be in {limits}, got {self.ratio}", "alignment_ratio")
        if not 0 <= self.weight < float("inf"):
            raise InvalidRequest(f"weight must be a finite number ≥ 0, got {self.weight}", "principle")


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
        num_ends = len(self.stop_token_ids)
        _require(num_ends <= MAX_STOP_TOKENS, "stop_token_ids", f"at most {MAX_STOP_TOKENS} tokens", num_ends)
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
        for name in ("weights", "ratios"):  # whole numbers would make tensors of whole numbers
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        object.__setattr__(self, "coefficients", METHODS[self.method].coefficients(self.weights, self.ratios))
        assert (self.base is None) == (not any(self.coefficients))

    @property
    def mixes_by_logits(self) -> bool:
        """Whether the coefficients depend on the logits."""
        return self.method in ("adaptive", "opad")

    @property
    def branches(self) -> tuple[tuple[int, ...], ...]:
        """Principled branches first, the base branch last."""
        return self.principled if self.base is None else (*self.principled, self.base)
