"""What is being generated: branches and sequences."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from linalign.alignment_core.output import FinishReason, Output, Times, Usage
from linalign.alignment_core.request import Prompt, SamplingParams
from linalign.alignment_core.scheduling.speculation import PromptLookup
from linalign.alignment_core.text.detokenizer import TextStream

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from linalign.alignment_core.decoding.edits import Edits


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


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice being generated: its branches, its parameters, and what has been drawn so far.

    matcher: where the reply is in its structure. is_queued: it has not run yet. directions: OPAD's latest, by
    position. edits: made when the first token is edited. was_told: on_output has got, or gets, the last output.
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
    was_told: bool = False
    edits: "Edits | None" = None
    lookup: PromptLookup = field(init=False)
    directions: dict[int, Tensor] = field(default_factory=dict)
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        self.branches = [Branch(list(ids), salt=self.prompt.salt) for ids in self.prompt.branches]
        self.lookup = PromptLookup(self.branches[0].tokens)

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
        return self.params.penalises or self.matcher is not None or self.num_replied < 0

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
