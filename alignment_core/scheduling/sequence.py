"""What the loop keeps of a request: branches and sequences."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from linalign.alignment_core.output import FinishReason, Output, Times, Usage
from linalign.alignment_core.request import Prompt, SamplingParams
from linalign.alignment_core.scheduling.speculation import PromptLookup
from linalign.alignment_core.text.detokenizer import TextStream

if TYPE_CHECKING:
    from linalign.alignment_core.decoding.edits import Edits
    from linalign.alignment_core.decoding.json_runs import ReplyMatcher
    from linalign.alignment_core.decoding.thinking import ThinkingBudget


class Status(Enum):
    """Where a sequence is. Only the scheduler changes it."""

    WAITING = auto()  # for its first step
    RUNNING = auto()  # its branches hold pages
    PREEMPTED = auto()  # its pages are freed; it waits to run again
    FINISHED = auto()  # the scheduler has forgotten it


@dataclass(slots=True)
class Branch:
    """One token context and its pages. The pool has the keys and values of tokens [0, num_computed)."""

    tokens: list[int]  # the prompt, then the reply
    pages: list[int] = field(default_factory=list)  # page numbers, in the order of the tokens
    page_hashes: list[bytes] = field(default_factory=list)  # of the first full pages: see `kv_cache.hash_pages`
    num_published: int = 0  # leading pages that other branches may adopt
    num_computed: int = 0  # leading tokens whose keys and values are in the pages
    salt: bytes = b""  # pages are shared only with branches of the same salt

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.num_computed


class OutputChannel:
    """Hands a choice's outputs to its listener, from any thread, and nothing after the last one."""

    def __init__(self, on_output: Callable[[Output], None]) -> None:
        self._on_output = on_output
        self._lock = threading.RLock()
        self._is_closed = False

    def send(self, output: Output) -> None:
        """Raises what the listener raises."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = output.finish_reason is not None
                self._on_output(output)


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice that is generated: its branches, its parameters, and its reply so far."""

    request_id: int
    prompt: Prompt
    params: SamplingParams
    seed: int  # of the draws; params.seed, or a fresh one
    max_tokens: int  # length of the reply, given tokens included
    stop_token_ids: frozenset[int]  # tokens that end the reply
    eos_token_ids: frozenset[int]  # the model's own ends of sequence
    text: TextStream  # token ids to text
    outputs: OutputChannel
    choice: int = 0  # number among the choices of the request
    matcher: "ReplyMatcher | None" = None  # where the reply is in its structure
    thinking: "ThinkingBudget | None" = None  # where the reply is in its reasoning, if that is bounded
    status: Status = Status.WAITING
    branches: list[Branch] = field(init=False)  # the principled ones, then the base
    output_ids: list[int] = field(default_factory=list)  # the reply so far, given tokens included
    num_preemptions: int = 0
    num_tokens_computed: int = 0  # of all branches
    num_tokens_extra: int = 0  # the part of all branches except the first
    num_tokens_cached: int = 0  # that prefix reuse spared, of all branches
    num_prompt_cached: int = 0  # that prefix reuse spared in the first principled prompt
    last_turn: int = 0  # the scheduler's number of the latest step that the sequence ran in
    edits: "Edits | None" = None  # made when the first token is edited
    lookup: PromptLookup = field(init=False)  # drafts
    directions: dict[int, Tensor] = field(default_factory=dict)  # OPAD's memory: the newest directions by position
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        self.branches = [Branch(list(ids), salt=self.prompt.salt) for ids in self.prompt.branches]
        self.lookup = PromptLookup(self.branches[0].tokens)

    def unwanted_ends(self, position: int) -> frozenset[int]:
        """The tokens that must not come at this position of the reply, if another token can."""
        if position < self.params.min_tokens:
            return self.stop_token_ids | (self.eos_token_ids if self.matcher is not None else frozenset())
        return self.eos_token_ids if self.params.ignore_eos and self.matcher is not None else frozenset()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all branches, given tokens included."""
        return sum(len(ids) for ids in self.prompt.branches) + len(self.prompt.given)

    @property
    def needs_last_token(self) -> bool:
        """Whether the host must know the last token before the next one can be drawn: for edits that depend on it, and
        while given tokens remain."""
        is_thinking = self.thinking is not None and not self.thinking.is_over
        return self.params.penalises or self.matcher is not None or is_thinking or self.num_replied < 0

    @property
    def remaining_given(self) -> tuple[int, ...]:
        return self.prompt.given[len(self.output_ids) :]

    @property
    def is_decoding(self) -> bool:
        """Whether each branch has one token left to compute, its newest."""
        return all(branch.remaining == 1 for branch in self.branches)

    @property
    def num_drawn(self) -> int:
        """Tokens after the prompt, the one that is being drawn included."""
        return len(self.branches[0].tokens) - len(self.prompt.principled[0])

    @property
    def num_replied(self) -> int:
        """Tokens of the reply that were not given; negative while given tokens remain."""
        return len(self.output_ids) - len(self.prompt.given)

    def expect(self, place: int) -> None:
        """Append a placeholder for the token that the launched step draws at `place`: −1 − place."""
        for branch in self.branches:
            branch.tokens.append(-1 - place)

    def append(self, token_id: int) -> None:
        """Append the drawn token to every branch, over its placeholder if it has one."""
        for branch, prompt in zip(self.branches, self.prompt.branches, strict=True):
            place = len(prompt) + len(self.output_ids)
            branch.tokens[place : place + 1] = [token_id]
        self.output_ids.append(token_id)
        self.directions.pop(self.num_replied - 2, None)  # the next draw needs the one before it

    def last_output(self, reason: FinishReason, output: Output | None = None) -> Output:
        """The last output of the sequence. output: of its last token, if there is one."""
        usage = Usage(
            prompt_tokens=len(self.prompt.principled[0]) + len(self.prompt.given),
            prompt_cached_tokens=self.num_prompt_cached,
            completion_tokens=max(self.num_replied, 0),
            branches=len(self.branches),
            branch_tokens_computed=self.num_tokens_computed,
            extra_tokens_computed=self.num_tokens_extra,
            prefix_cached_tokens=self.num_tokens_cached,
        )
        output = output or Output("", choice=self.choice)
        stop_string = self.text.stop_string
        return replace(output, finish_reason=reason, usage=usage, times=self.times, stop_string=stop_string)


class NextToken(NamedTuple):
    """A token that a step draws: `position` is its number in the sequence's reply, negative for a given token."""

    sequence: Sequence
    position: int
