"""Which rows run in the next step.

The unit is the sequence: its branches are admitted, preempted and freed together. A sequence draws a
token only in a step that brings all of its branches to their newest tokens. Decodes come first,
longest wait first; then prefills in order of arrival, each cut to the rest of the step's token budget.
"""

import itertools
from collections import deque

from linalign.alignment_core.scheduling.kv_cache import PagePool
from linalign.alignment_core.scheduling.sequence import Branch, Sequence, Status
from linalign.alignment_core.scheduling.step import Row, Step

SPECULATIVE_BATCH = 64  # tokens; in a longer step drafts would cost time


class Scheduler:
    """Sequences that wait and sequences that run. Not thread-safe: the loop owns it.

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
        """Forget a sequence and free its pages. A second call has no effect."""
        status, sequence.status = sequence.status, Status.FINISHED  # first: an error below must not leave it running
        if status is Status.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif status is not Status.FINISHED:
            self.waiting.remove(sequence)

    def needs_pending_tokens(self) -> bool:
        """Whether the next step should be planned after the tokens of the pending step are known."""
        if any(sequence.needs_last_token for sequence in self.running):
            return True
        rows = sum(len(sequence.branches) for sequence in self.running)
        if self.num_speculative_tokens == 0 or rows > SPECULATIVE_BATCH // 2:
            return False
        may_draft = [sequence.lookup.may_draft_next() for sequence in self.running]  # each call counts a pause
        return any(may_draft)

    def schedule(self, may_draft: bool = True) -> Step:
        """Plan the next step, allocate and publish its pages. `commit` must follow the forward pass.

        may_draft: whether all drawn tokens are known. Only then can drafts follow them.
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
            if sequence.status is Status.WAITING:
                step.admitted.append(sequence)
            sequence.status = Status.RUNNING
            self.num_tokens_admitted += sum(len(branch.tokens) for branch in sequence.branches)
            self._schedule(sequence, step)
        if may_draft:
            self._lengthen_by_given(step)
            for sequence in step.drawing:
                self._speculate(sequence, step)
        return step

    def _schedule_all(self, sequences: list[Sequence], step: Step) -> None:
        for sequence in sequences:
            # A sequence may be preempted by the ones before it.
            if sequence.status is Status.RUNNING and sequence.num_drawn < sequence.max_tokens:
                self._schedule(sequence, step)

    def commit(self, step: Step) -> None:
        """Record that the step's forward pass has run. Drafts count as computed when they are accepted."""
        for sequence, rows in step.rows.items():
            for row in rows:
                row.branch.num_computed = row.end - len(row.drafts)
                sequence.num_tokens_computed += row.num_tokens
                if row.branch is not sequence.branches[0]:
                    sequence.num_tokens_extra += row.num_tokens

    def _admits(self, sequence: Sequence, step: Step) -> bool:
        # One spare page for each running sequence, so that the next decode does not undo the admission.
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
            if branch is sequence.branches[0] and not (sequence.num_drawn or sequence.num_preemptions):
                sequence.num_prompt_cached += num_cached
            num_tokens = min(branch.remaining, budget)
            if num_tokens == branch.remaining and budget - num_tokens < later:
                num_tokens -= 1  # the later branches need the token: without them nothing is drawn
            end = branch.num_computed + num_tokens
            if not self._allocate(sequence, branch, end, step):
                return
            # The newest token may be trimmed below, so its page is published a step later.
            self.pool.publish(branch, min(end, len(branch.tokens) - 1))
            rows.append(Row(branch, branch.num_computed, end))
            budget -= end - branch.num_computed

        if all(row.end == len(row.branch.tokens) for row in rows):
            step.drawing.append(sequence)
        else:  # no branch gets ahead: the draw needs the logits of all branches in the same step
            rows = [Row(row.branch, row.start, min(row.end, len(row.branch.tokens) - 1)) for row in rows]
            rows = [row for row in rows if row.num_tokens]
        if rows:
            sequence.last_turn = next(self._turns)
            step.rows[sequence] = rows
            step.num_tokens += sum(row.num_tokens for row in rows)

    def _lengthen_by_given(self, step: Step) -> None:
        """Let decoding sequences take several given tokens in one step. All such sequences share SPECULATIVE_BATCH
        tokens, because each given token needs a row of logits.
        """
        for sequence in step.drawing:
            rows = step.rows[sequence]
            num_free = min(SPECULATIVE_BATCH - step.num_given, self.max_num_batched_tokens - step.num_tokens)
            num_given = min(
                num_free // len(rows),
                len(sequence.prompt.given) - len(sequence.output_ids),
                sequence.max_tokens - len(sequence.output_ids) - 1,
            )
            if num_given > 0 and not step.drafts(sequence):
                is_longer = self._lengthen(sequence, step, sequence.remaining_given[:num_given])
                step.num_given += is_longer * len(rows) * num_given

    def _speculate(self, sequence: Sequence, step: Step) -> None:
        """Append drafts to the rows of a decoding sequence while the step stays within SPECULATIVE_BATCH tokens."""
        rows = step.rows[sequence]
        max_drafts = min(
            self.num_speculative_tokens,
            (min(SPECULATIVE_BATCH, self.max_num_batched_tokens) - step.num_tokens) // len(rows),
            sequence.max_tokens - len(sequence.output_ids) - 1,
        )
        if max_drafts > 0 and not sequence.needs_last_token:
            self._lengthen(sequence, step, tuple(sequence.lookup.draft(max_drafts)))

    def _lengthen(self, sequence: Sequence, step: Step, drafts: tuple[int, ...]) -> bool:
        """Append drafts to the sequence's rows; False, and no change, if it is not decoding or pages are missing."""
        rows = step.rows[sequence]
        if not drafts or any(row.num_tokens > 1 for row in rows):
            return False
        if not all(self.pool.allocate(row.branch, row.end + len(drafts)) for row in rows):
            return False
        step.rows[sequence] = [Row(row.branch, row.start, row.end + len(drafts), drafts) for row in rows]
        step.num_tokens += len(rows) * len(drafts)
        return True

    def _allocate(self, sequence: Sequence, branch: Branch, num_tokens: int, step: Step) -> bool:
        """Allocate pages, preempting the newest sequences if need be; False if `sequence` itself is preempted."""
        while not self.pool.allocate(branch, num_tokens):
            victim = next(s for s in reversed(self.running) if s not in step.rows)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.PREEMPTED
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        for branch in sequence.branches:
            self.pool.release(branch)
