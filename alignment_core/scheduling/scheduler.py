"""Which rows run in the next step.

The unit is the sequence: its branches are admitted, preempted and freed together, and it draws a
token only in a step that brings every one of its branches to its newest token. Decodes come first,
those that have waited longest ahead, then prefills in order of arrival, each cut to what is left of
the step's token budget.
"""

import itertools
from collections import deque
from dataclasses import dataclass, field

from linalign.alignment_core.scheduling.kv_cache import PagePool
from linalign.alignment_core.scheduling.sequence import Branch, Sequence

SPECULATIVE_BATCH = 64  # tokens: a step that is longer anyway has no time to spare for drafts


@dataclass(frozen=True, slots=True)
class Row:
    """One branch's query tokens [start, end) in one forward pass; the last of them may be drafts."""

    branch: Branch
    start: int
    end: int
    drafts: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def tokens(self) -> list[int]:
        """One that is being drawn is negative, see `Sequence.expect`."""
        return [*self.branch.tokens[self.start : self.end], *self.drafts]

    def cut(self, num_tokens: int) -> "tuple[Row, Row]":
        """Its first tokens, and the others."""
        middle = self.start + num_tokens
        num_drafts = max(0, middle - (self.end - len(self.drafts)))
        head = Row(self.branch, self.start, middle, self.drafts[:num_drafts])
        return head, Row(self.branch, middle, self.end, self.drafts[num_drafts:])


@dataclass(slots=True)
class Step:
    """All rows of one forward pass. Sequences in `drawing` get a token: all their rows end at their newest one,
    or at the last of their drafts. admitted: those that ran from this step on. num_given: drafts that are given, of
    all rows.
    """

    rows: dict[Sequence, list[Row]] = field(default_factory=dict)
    admitted: list[Sequence] = field(default_factory=list)
    drawing: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
    num_given: int = 0

    def drafts(self, sequence: Sequence) -> tuple[int, ...]:
        return self.rows[sequence][0].drafts

    @property
    def has_drafts(self) -> bool:
        return any(self.drafts(sequence) for sequence in self.drawing)


class Scheduler:
    """Sequences that wait and sequences that run. Not thread-safe: the engine's loop owns it.

    num_speculative_tokens: the longest draft; 0 switches speculation off.
    """

    def __init__(
        self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int, num_speculative_tokens: int = 0
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_speculative_tokens = num_speculative_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self.num_tokens_admitted = 0
        self.num_tokens_cached = 0
        self._turns = itertools.count(1)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def awaits_tokens(self) -> bool:
        """Whether the tokens that are being drawn should be known before the next step is planned."""
        if any(sequence.follows_reply for sequence in self.running):
            return True
        rows = sum(len(sequence.branches) for sequence in self.running)
        if self.num_speculative_tokens == 0 or rows > SPECULATIVE_BATCH // 2:
            return False
        promises = [sequence.lookup.promises() for sequence in self.running]  # all are asked: they count their pauses
        return any(promises)

    def schedule(self, may_draft: bool = True) -> Step:
        """Plan the next step. Pages are allocated and published; `commit` must follow the forward pass.

        may_draft: whether all tokens drawn so far are known.
        """
        step = Step()
        preemptions = self.num_preemptions
        decoding = sorted((s for s in self.running if s.is_decoding), key=lambda s: s.last_turn)
        prefilling = [s for s in self.running if not s.is_decoding]
        self._schedule_all(decoding, step)
        if may_draft:
            self._lengthen_by_given(step)
        self._schedule_all(prefilling, step)
        while self.waiting and self.num_preemptions == preemptions and self._admits(self.waiting[0], step):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            step.admitted.append(sequence)
            self.num_tokens_admitted += sum(len(branch.tokens) for branch in sequence.branches)
            self._schedule(sequence, step)
        if may_draft:
            self._lengthen_by_given(step)
            for sequence in step.drawing:
                self._speculate(sequence, step)
        return step

    def _schedule_all(self, sequences: list[Sequence], step: Step) -> None:
        for sequence in sequences:
            if sequence in self.running and sequence.num_drawn < sequence.max_tokens:  # it may be preempted by now
                self._schedule(sequence, step)

    def commit(self, step: Step) -> None:
        """Record that the step's forward pass has run. Drafts count once they are accepted."""
        for sequence, rows in step.rows.items():
            for row in rows:
                row.branch.num_computed = row.end - len(row.drafts)
                sequence.num_tokens_computed += row.num_tokens
                if row.branch is not sequence.branches[0]:
                    sequence.num_tokens_extra += row.num_tokens

    def _admits(self, sequence: Sequence, step: Step) -> bool:
        # One spare page a running sequence, so that an admission is not undone by the next decode.
        pages = sum(self.pool.pages_for(len(branch.tokens) + 1) for branch in sequence.branches)
        return (
            len(self.running) < self.max_num_seqs
            and step.num_tokens < self.max_num_batched_tokens
            and pages + len(self.running) <= self.pool.num_free
        )

    def _schedule(self, sequence: Sequence, step: Step) -> None:
        budget = self.max_num_batched_tokens - step.num_tokens
        rows = []
        for later, branch in zip(range(len(sequence.branches) - 1, -1, -1), sequence.branches, strict=True):
            num_cached = self.pool.adopt(branch)
            sequence.num_tokens_cached += num_cached
            self.num_tokens_cached += num_cached
            if branch is sequence.branches[0] and not (sequence.num_drawn or sequence.was_preempted):
                sequence.num_prompt_cached += num_cached
            num_tokens = min(branch.remaining, budget)
            if num_tokens == branch.remaining and budget - num_tokens < later:
                num_tokens -= 1  # nothing is drawn without the later branches: leave the token to them
            end = branch.num_computed + num_tokens
            if not self._allocate(sequence, branch, end, step):
                return
            # The newest token may be trimmed below, so the page that it fills is published a step later.
            self.pool.publish(branch, min(end, len(branch.tokens) - 1))
            rows.append(Row(branch, branch.num_computed, end))
            budget -= end - branch.num_computed

        if all(row.end == len(row.branch.tokens) for row in rows):
            step.drawing.append(sequence)
        else:  # no branch gets ahead: the logits of all are wanted in the same step
            rows = [Row(row.branch, row.start, min(row.end, len(row.branch.tokens) - 1)) for row in rows]
            rows = [row for row in rows if row.num_tokens]
        if rows:
            sequence.last_turn = next(self._turns)
            step.rows[sequence] = rows
            step.num_tokens += sum(row.num_tokens for row in rows)

    def _lengthen_by_given(self, step: Step) -> None:
        """Decoding sequences whose next tokens are given take more of them: a batch for all, whatever else runs, as
        every one has logits of its own.
        """
        for sequence in step.drawing:
            rows = step.rows[sequence]
            left = min(SPECULATIVE_BATCH - step.num_given, self.max_num_batched_tokens - step.num_tokens)
            num_given = min(
                left // len(rows),
                len(sequence.prompt.given) - len(sequence.output_ids),
                sequence.max_tokens - len(sequence.output_ids) - 1,
            )
            if num_given > 0 and not step.drafts(sequence):
                is_longer = self._lengthen(sequence, step, sequence.remaining_given[:num_given])
                step.num_given += is_longer * len(rows) * num_given

    def _speculate(self, sequence: Sequence, step: Step) -> None:
        """Lengthen a decoding sequence's rows by drafts, as far as they cost next to nothing."""
        rows = step.rows[sequence]
        most = min(
            self.num_speculative_tokens,
            (min(SPECULATIVE_BATCH, self.max_num_batched_tokens) - step.num_tokens) // len(rows),
            sequence.max_tokens - len(sequence.output_ids) - 1,
        )
        if most > 0 and not sequence.follows_reply:
            self._lengthen(sequence, step, tuple(sequence.lookup.draft(most)))

    def _lengthen(self, sequence: Sequence, step: Step, drafts: tuple[int, ...]) -> bool:
        """Whether the sequence is decoding and there are pages for it."""
        rows = step.rows[sequence]
        if not drafts or any(row.num_tokens > 1 for row in rows):
            return False
        if not all(self.pool.allocate(row.branch, row.end + len(drafts)) for row in rows):
            return False
        step.rows[sequence] = [Row(row.branch, row.start, row.end + len(drafts), drafts) for row in rows]
        step.num_tokens += len(rows) * len(drafts)
        return True

    def _allocate(self, sequence: Sequence, branch: Branch, num_tokens: int, step: Step) -> bool:
        """Get pages, preempting the newest sequences if need be; False if `sequence` itself had to go."""
        while not self.pool.allocate(branch, num_tokens):
            victim = next(s for s in reversed(self.running) if s not in step.rows)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.was_preempted = True
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        for branch in sequence.branches:
            self.pool.release(branch)
