"""What an engine can never serve: refused before anything is computed."""

from collections.abc import Collection
from dataclasses import dataclass

from linalign.alignment_core.errors import FIELD, InvalidRequest
from linalign.alignment_core.request import Prompt, SamplingParams
from linalign.alignment_core.scheduling.kv_cache import PagePool


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes of an engine, as in EngineConfig, and the vocabulary of its model."""

    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    pool: PagePool

    def max_tokens(self, prompt: Prompt, params: SamplingParams, n: int) -> int:
        """The longest possible reply of each of n choices, in tokens, given tokens included. Raises InvalidRequest."""
        num_branches = len(prompt.branches)
        if n < 1 or n * num_branches > max(self.max_num_seqs, num_branches):
            bounds = f"[1, {self.max_num_seqs}]"
            raise InvalidRequest(f"{FIELD} is {n}, but {num_branches} branches times {FIELD} must be in {bounds}", "n")
        self._refuse_foreign_tokens(params)
        if not all(prompt.branches):
            raise InvalidRequest("prompt must not be empty", "prompt")
        lengths = [len(ids) + len(prompt.given) for ids in prompt.branches]
        if max(lengths) >= self.max_model_len + (params.max_tokens == 0):
            raise InvalidRequest(
                f"the prompt has {_in_words(lengths)} tokens, but the context holds {self.max_model_len}, "
                "including the reply; shorten the messages or the principle",
                "prompt",
                "too_long",
            )
        for ids in (*prompt.branches, prompt.given):
            self._refuse_foreign_ids(ids, "prompt")
        if num_branches > self.max_num_batched_tokens:
            raise InvalidRequest(f"{num_branches} branches are more than one step can take", "principles")
        if params.max_tokens == 0 and not prompt.given:
            raise InvalidRequest(f"{FIELD} must be ≥ 1, got 0", "max_tokens")
        return len(prompt.given) + self._room(lengths, params.max_tokens)

    def _refuse_foreign_tokens(self, params: SamplingParams) -> None:
        self._refuse_foreign_ids(params.logit_bias, "logit_bias")
        self._refuse_foreign_ids(params.stop_token_ids, "stop_token_ids")

    def _refuse_foreign_ids(self, ids: Collection[int], field: str) -> None:
        """Refuse tokens that the model has no embedding for; a tokenizer may know some."""
        for id in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= id < self.vocab_size:
                raise InvalidRequest(f"{FIELD}: the model has no token {id}", field)

    def _room(self, lengths: list[int], max_tokens: int | None) -> int:
        """Tokens of a reply after branches of these lengths: at most max_tokens, and at most as many as fit."""
        longest = max(lengths)
        left = self.max_model_len - longest
        max_tokens = left if max_tokens is None else min(max_tokens, left)
        if self._num_pages(lengths, max_tokens) > self.pool.num_pages:
            num_cached = self.pool.num_pages // len(lengths) * self.pool.page_size
            max_tokens = max(1, min(max_tokens, num_cached - longest))
        pages = self._num_pages(lengths, max_tokens)
        if pages > self.pool.num_pages:
            raise InvalidRequest(
                f"{len(lengths)} branches of up to {longest + max_tokens} tokens need {pages} pages of KV cache, "
                f"but there are {self.pool.num_pages}",
                "prompt",
                "too_long",
            )
        return max_tokens

    def _num_pages(self, lengths: list[int], max_tokens: int) -> int:
        return sum(self.pool.pages_for(length + max_tokens) for length in lengths)


def _in_words(lengths: list[int]) -> str:
    if len(set(lengths)) == 1:
        return str(lengths[0])
    return f"{max(lengths)} (with the principle; {min(lengths)} without)"
