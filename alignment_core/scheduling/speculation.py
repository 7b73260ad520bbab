"""Prompt lookup: a reply that repeats its context is drafted from there and verified in one forward pass.

Saxena, "Prompt Lookup Decoding", 2023. The draft is the same for every branch of a sequence, as all
of them share what has been generated. Verification draws at every drafted position from the mixed
distribution, with that position's own number, and goes on while the draw is the draft: a token is
accepted with its own probability, which is speculative sampling (Leviathan et al., ICML 2023)
for a draft without a distribution of its own. So the reply is the one that would have been drawn
token by token, to the very token under one seed.
"""

NGRAMS = (3, 2)  # tokens that must match, the longer first
LONGEST_PAUSE = 32  # steps


class PromptLookup:
    """Drafts for one sequence.

    tokens: the context so far. The sequence owns it, appends to it and never shortens it. The last token
    may be a placeholder when `may_draft_next` is called, but not when `draft` is.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram: the place after its last occurrence
        self._num_indexed = 0
        self._length = 4
        self._misses = 0
        self._resume = 0  # tokens before the next draft
        self._may_draft_next = False

    def may_draft_next(self) -> bool:
        """Whether the tokens before the newest one occur earlier, so that a draft is worth waiting for the newest."""
        if len(self._tokens) < self._resume:
            return False
        self._may_draft_next = self._match(len(self._tokens) - 1) is not None
        return self._may_draft_next

    def draft(self, max_tokens: int) -> list[int]:
        """Up to `max_tokens` tokens that followed the newest ones at their last occurrence; none if there was none."""
        if len(self._tokens) < self._resume:
            return []
        start = self._match(len(self._tokens))
        if start is None and self._may_draft_next:
            self.learn(0, 0)  # the wait for the newest token gained nothing
        self._may_draft_next = False
        return [] if start is None else self._continuation(start, min(max_tokens, self._length))

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Draft more after an accepted draft, less after a rejected one, and pause after several rejected ones."""
        if num_accepted:
            self._misses = 0
            self._length = 2 * num_drafted if num_accepted == num_drafted else num_accepted + 1
        else:
            self._misses += 1
            self._length = 1
            self._resume = len(self._tokens) + min(2**self._misses, LONGEST_PAUSE) - 1

    def _continuation(self, start: int, length: int) -> list[int]:
        text = self._tokens[start : start + length]
        while len(text) < length:  # the match reaches the end of the context: repeat it with that period
            text.append(text[start - len(self._tokens) + len(text)])
        return text

    def _match(self, end: int) -> int | None:
        """The place after the last earlier occurrence of the n-gram before `end`; None if there is none."""
        for place in range(self._num_indexed, end):  # n-grams that have a token after them
            for n in NGRAMS:
                if place >= n:
                    self._ends[tuple(self._tokens[place - n : place])] = place
        self._num_indexed = max(self._num_indexed, end)
        starts = (self._ends.get(tuple(self._tokens[end - n : end])) for n in NGRAMS)
        return next((start for start in starts if start is not None), None)
