"""What users hand in: principles, prompts, and how tokens are drawn. Free of torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from linalign.alignment_core.errors import FIELD, InvalidRequest
from linalign.alignment_core.methods import METHODS, Coefficients, Method

MIN_RATIO, MAX_RATIO = -10.0, 20.0
DEFAULT_RATIO = 2.0
MAX_PRINCIPLES = 16
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_BIASES = MAX_STOP_TOKENS = 1024
MAX_BIAS = 100.0  # of either sign
MAX_PENALTY = 2.0  # presence and frequency penalty, of either sign
MIN_REPETITION, MAX_REPETITION = 0.01, 10.0
MIN_SEED, MAX_SEED = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class Principle:
    """A preference in plain words. Raises InvalidRequest.

    text: The preference.
    weight: ≥ 0, relative to the weights of the other principles.
    ratio: How far to extrapolate along the direction of this principle, [MIN_RATIO, MAX_RATIO].
    """

    text: str
    weight: float = 1.0
    ratio: float = DEFAULT_RATIO

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InvalidRequest("principle must not be empty", "principles")
        _require_within("ratio", self.ratio, MIN_RATIO, MAX_RATIO)
        if not 0 <= self.weight < float("inf"):
            raise InvalidRequest(f"weight must be a finite number ≥ 0, got {self.weight}", "principles")


@dataclass(frozen=True, slots=True)
class Structure:
    """What a reply must look like.

    kind, text: A JSON schema. A regular expression that matches the whole reply. A JSON list of strings to choose
        from. A grammar in Lark or GBNF. For "lark", a grammar in llguidance's own form, which may hold JSON schemas.
    name: What errors call the structure.
    head: A mark, in Lark, in front of the structure.
    after: A mark, in Lark, up to which the reply is free. before: A mark, in Lark, with which this free part begins; it
        may then be left out. "" if the prompt has begun it. may_space: Whether white space may follow the first mark.
    instead: A grammar in llguidance's form that the reply may match instead of head and structure.
    json_after: A text after which the JSON of the reply begins, each time; "" if the reply itself is JSON.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar", "lark"]
    text: str
    name: str = "structure"
    head: str = ""
    after: str = ""
    before: str = ""
    may_space: bool = True
    instead: str = ""
    json_after: str = ""


@dataclass(frozen=True, slots=True)
class Thinking:
    """A bound for the reasoning at the beginning of a reply.

    budget: Tokens after which the mark that ends the reasoning is forced; tokens of marks do not count.
    begin, end: The marks, as text. end_ids: The tokens of the second one, and of further text that is forced.
    is_begun: Whether the prompt ends with the first mark.
    repeats: Whether reasoning may begin again behind an end mark. The budget is for all of it.
    """

    budget: int
    begin: str
    end: str
    end_ids: tuple[int, ...]
    is_begun: bool = False
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class Uncut:
    """A part of a reply that stop strings do not end, such as a call.

    begins: Texts that begin the part. end: The text that ends it; "" if only the end of the reply does.
    is_first: Whether the part is only at the beginning of the reply, after white space.
    """

    begins: tuple[str, ...]
    end: str = ""
    is_first: bool = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn. Raises InvalidRequest for a value out of range.

    The draw:
        temperature: ≥ 0. 0 takes the best token.
        top_p: (0, 1]. top_k: ≥ 0, 0 switches it off. min_p: [0, 1].
        seed: 64 bits. None draws a fresh seed.

    The end of the reply:
        max_tokens: Longest reply; shorter if the context leaves less. None means up to the end of the context.
        stop: Strings that end the reply and are not part of it.
        uncut: The part of the reply in which stop strings have no effect.
        stop_token_ids: Tokens that end the reply, in addition to the model's end-of-sequence tokens.
        ignore_eos: Whether the model's own ends of sequence do not end the reply.
        min_tokens: Before this many tokens only max_tokens ends the reply.

    Edits of the principled logits (docs/design.md, section 2, step 1):
        presence_penalty, frequency_penalty: [-2, 2], subtracted from the logits of tokens in the reply, once, and once
            for each occurrence.
        repetition_penalty: [0.01, 10], divides the positive and multiplies the negative logits of tokens in the
            prompt and the reply (Keskar et al., "CTRL", 2019).
        logit_bias: Token id to a number in [-100, 100] that is added to its logit.
        structure: What the reply must look like. Tokens that would break the structure are edited out.
        thinking: A bound for the reasoning. Where it ends, all tokens but those of the mark are edited out.

    The output:
        skip_special_tokens: Whether the text omits control tokens.
        logprobs: How many alternatives to report with every token. None reports nothing.
        trace: Whether to report the principled and the base policy of every token too.

    The plausible set (docs/design.md, section 2, step 4):
        alignment_top_p: (0, 1], its mass. None means the method's own.
        alignment_temperature: > 0. None means max(temperature, 0.5).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    uncut: Uncut | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True
    structure: Structure | None = None
    thinking: Thinking | None = None
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
        _require_within("min_p", self.min_p, 0, 1)
        _require(self.seed is None or MIN_SEED <= self.seed <= MAX_SEED, "seed", "a 64-bit integer", self.seed)
        _require(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "≥ 0", self.max_tokens)
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings", len(self.stop))
        _require(all(self.stop), "stop", "free of empty strings", self.stop)
        num_ends = len(self.stop_token_ids)
        _require(num_ends <= MAX_STOP_TOKENS, "stop_token_ids", f"at most {MAX_STOP_TOKENS} tokens", num_ends)
        _require(self.min_tokens >= 0, "min_tokens", "≥ 0", self.min_tokens)
        if self.max_tokens is not None:
            _require(self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens", self.min_tokens)
        for name in ("presence_penalty", "frequency_penalty"):
            _require_within(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY)
        _require_within("repetition_penalty", self.repetition_penalty, MIN_REPETITION, MAX_REPETITION)
        _require(len(self.logit_bias) <= MAX_BIASES, "logit_bias", f"at most {MAX_BIASES} tokens", len(self.logit_bias))
        for bias in self.logit_bias.values():
            _require_within("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
        _require_within("logprobs", self.logprobs or 0, 0, MAX_LOGPROBS)
        if self.thinking is not None:
            _require(self.thinking.budget >= 0, "thinking", "≥ 0 tokens", self.thinking.budget)
            _require(bool(self.thinking.end_ids), "thinking", "ended by a mark", self.thinking.end)
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
        """Alternatives in the report of a token; None where there is no report."""
        return 0 if self.trace and self.logprobs is None else self.logprobs

    @property
    def edits(self) -> bool:
        """Whether the principled logits are edited."""
        return bool(self.penalises or self.logit_bias or self.min_tokens or self.structure or self.thinking)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids of every branch of a request.

    A plain request is one principled branch with weight 1 and ratio 0.

    principled: k ≥ 1 branches, mixed with `weights`, which sum to 1, and extrapolated by `ratios`.
    base: The branch without a principle. None if every coefficient is 0, because there is no direction then.
    given: The first tokens of the reply, which are not drawn; for the log-probabilities of a text.
    continues: Whether the reply continues the text of the prompt.
    salt: 32 bytes, or none. Prefixes are shared with prompts of the same salt alone, so that nobody else can find out
        by timing which prompts were sent.
    method: How the method makes `coefficients` of the ratios: docs/methods.md.
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
        """The principled branches, then the base branch."""
        return self.principled if self.base is None else (*self.principled, self.base)


def _require(condition: bool, field: str, rule: str, value: object) -> None:
    if not condition:
        raise InvalidRequest(f"{FIELD} must be {rule}, got {value!r}", field)


def _require_within(field: str, value: float, minimum: float, maximum: float) -> None:
    _require(minimum <= value <= maximum, field, f"in [{minimum:g}, {maximum:g}]", value)
