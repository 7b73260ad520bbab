"""The engine's loop: schedule, launch, land, accept, finish. Not thread-safe: only `Engine` uses it."""

import itertools
import logging
import time
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from linalign.alignment_core.decoding.grammars import Grammars
from linalign.alignment_core.decoding.sampler import Drawn, Sampler
from linalign.alignment_core.decoding.static_draw import NO_TOKEN
from linalign.alignment_core.errors import RequestFailed
from linalign.alignment_core.execution.model_runner import ModelRunner
from linalign.alignment_core.output import FinishReason, Output, TokenLogprob
from linalign.alignment_core.pending_step import PendingStep
from linalign.alignment_core.scheduling.backlog import Backlog
from linalign.alignment_core.scheduling.scheduler import Scheduler
from linalign.alignment_core.scheduling.sequence import NextToken, Sequence, Status
from linalign.alignment_core.scheduling.step import Step

log = logging.getLogger(__name__)


class Loop:
    """Runs sequences to their ends. An error in one sequence ends only that sequence."""

    def __init__(
        self, runner: ModelRunner, scheduler: Scheduler, sampler: Sampler, backlog: Backlog, overlaps: bool
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.sampler = sampler
        self.backlog = backlog
        self.overlaps = overlaps  # whether step N + 1 is launched before the tokens of step N are read
        self.requests: dict[int, list[Sequence]] = {}  # by request id: the choices that have not ended
        self.num_drafted = self.num_accepted = self.num_generated = 0  # tokens since the engine was made
        self._pending: PendingStep | None = None  # the launched step whose tokens are not read yet
        self._unheard: list[int] = []  # ids of requests whose listener has raised

    def add(self, sequence: Sequence) -> None:
        """Take in a new sequence."""
        self.requests.setdefault(sequence.request_id, []).append(sequence)
        self.scheduler.add(sequence)

    def end(self, request_id: int, reason: FinishReason) -> None:
        """End the choices of a request that have not ended."""
        for sequence in self.requests.get(request_id, [])[:]:
            try:
                self._finish(sequence, reason)
            except Exception as error:
                self._fail(sequence, error)

    def step(self) -> bool:
        """One turn of the loop; False if there was nothing to compute.

        With overlap the device computes step N + 1 while the host reads the tokens of step N.
        """
        self._abort_unheard()
        if self._pending and self.scheduler.needs_pending_tokens():
            self._land_pending()
        step = self._schedule()
        if not step.rows:
            return self._land_pending()
        launched = self._launch(step)
        if self.overlaps and not step.has_drafts:
            for place, sequence in enumerate(step.drawing):
                sequence.expect(place)
            self._land_pending()
            self._pending = launched
        else:
            self._land(launched)
        return True

    def _schedule(self) -> Step:
        step = self.scheduler.schedule(may_draft=self._pending is None)
        for sequence in step.admitted:
            self.backlog.leave(sequence)
            sequence.times.admitted = time.monotonic()
        return step

    def _launch(self, step: Step) -> PendingStep:
        """Run the forward pass, and draw for every sequence, at its drafts too."""
        logits = self.runner.forward(step)
        self.scheduler.commit(step)
        next_tokens = step.next_tokens
        try:
            drawn = [self.sampler.draw(logits, next_tokens)] if next_tokens else []
        except Exception:
            log.exception("A step's tokens could not be drawn together")
        else:
            return PendingStep(step, drawn)
        return PendingStep(step, self._draw_apart(step, logits, next_tokens))

    def _draw_apart(self, step: Step, logits: Tensor, next_tokens: Seq[NextToken]) -> list[Drawn]:
        """Draw for each sequence separately, which also takes less memory. A sequence whose draw fails ends."""
        sizes = [len(sequence.branches) for sequence, _ in next_tokens]
        rows = torch.split(logits[: sum(sizes)], sizes)  # fixed shapes have more rows
        drawn = []
        for sequence in step.drawing:
            lines = [line for line, next_token in enumerate(next_tokens) if next_token.sequence is sequence]
            try:
                drawn.append(Sampler().draw(torch.cat([rows[i] for i in lines]), [next_tokens[i] for i in lines]))
            except Exception as error:
                self._fail(sequence, error)
        step.drawing = [sequence for sequence in step.drawing if sequence.status is not Status.FINISHED]
        if self.overlaps and drawn:  # the next step reads the tokens there
            tokens = torch.cat([part.tokens for part in drawn])
            self.runner.drawn[: len(tokens)].copy_(tokens)
        return drawn

    def _land_pending(self) -> bool:
        """Wait for the pending step; False if there is none."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._land(pending)
        return pending is not None

    def _land(self, pending: PendingStep) -> None:
        """Accept the drawn tokens, and the drafts that they confirm. Sequences may have ended meanwhile."""
        tokens = pending.wait()
        for sequence in pending.step.drawing:
            drafts = pending.step.drafts(sequence)
            drawn = list(itertools.islice(tokens, 1 + len(drafts)))
            if sequence.status is Status.FINISHED:
                continue
            num_accepted, is_given = 0, bool(sequence.remaining_given)
            for (token, logprobs), draft in zip(drawn, (*drafts, None), strict=True):
                if not self._accepts(sequence, token, logprobs) or token != draft:
                    break
                num_accepted += 1
                for branch in sequence.branches:
                    branch.num_computed += 1
            if drafts and not is_given:
                sequence.lookup.learn(len(drafts), num_accepted)
                self.num_drafted += len(drafts)
                self.num_accepted += num_accepted

    def _accepts(self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprob, ...]) -> bool:
        """`_accept`, but an error ends only this sequence."""
        try:
            return self._accept(sequence, token, logprobs)
        except Exception as error:
            self._fail(sequence, error)
            return False

    def _accept(self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprob, ...]) -> bool:
        """Append a token to the reply; False if the reply ends with it. Raises RequestFailed."""
        if token == NO_TOKEN:
            raise RequestFailed("the model's logits are not finite here, so no token can be drawn")
        sequence.append(token)
        is_given = sequence.num_replied <= 0
        if not is_given:
            sequence.times.first_token = sequence.times.first_token or time.monotonic()
        self.num_generated += not is_given
        may_stop = not is_given and sequence.num_replied > sequence.params.min_tokens
        is_stop = ended = may_stop and token in sequence.stop_token_ids
        is_end = is_stop or (sequence.matcher is not None and token in sequence.eos_token_ids)
        text = "" if is_end or is_given else sequence.text.add(token, may_stop)
        if sequence.thinking is not None and not is_given:
            sequence.thinking.take(token)
        if sequence.matcher is not None and not is_stop and not is_given:
            sequence.matcher.consume_token(token)
            ended = sequence.matcher.is_stopped()
        reason: FinishReason | None = None
        error = None
        if sequence.params.structure and sequence.matcher and sequence.matcher.is_error():
            reason, error = "error", Grammars.failure(sequence.params.structure, sequence.matcher)
        elif ended or sequence.text.stopped:
            reason = "stop"
        elif len(sequence.output_ids) >= sequence.max_tokens:
            reason = "length"
        output = Output(text, (token,), reason, None, sequence.choice, () if is_stop else logprobs, error)
        if reason:
            self._finish(sequence, reason, output)
        else:
            self._send(sequence, output)
        return reason is None

    def _finish(self, sequence: Sequence, reason: FinishReason, output: Output | None = None) -> None:
        """End a sequence. output: of its last token, if there is one."""
        rest = sequence.text.finish()
        self._forget(sequence)
        if sequence.text.stopped:
            reason = "stop"
        last = sequence.last_output(reason, output)
        self._send(sequence, replace(last, text=last.text + rest))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence after an error. If it has ended already, its listener gets no second end."""
        log.error("Request %d failed", sequence.request_id, exc_info=error)
        if sequence.status is not Status.FINISHED:
            for branch in sequence.branches:
                self.scheduler.pool.unpublish(branch)
            self._forget(sequence)
        unknown = RequestFailed("the server failed in this request; others are not affected")
        failed = error.with_traceback(None) if isinstance(error, RequestFailed) else unknown  # frames hold memory
        self._send(sequence, replace(sequence.last_output("error"), error=failed))

    def _forget(self, sequence: Sequence) -> None:
        choices = self.requests[sequence.request_id]
        choices.remove(sequence)
        if not choices:
            del self.requests[sequence.request_id]
        if sequence.status is Status.WAITING:
            self.backlog.leave(sequence)
        self.scheduler.remove(sequence)

    def _send(self, sequence: Sequence, output: Output) -> None:
        try:
            sequence.outputs.send(output)
        except Exception:  # an error of the listener harms no other request
            log.exception("The listener of request %d failed", sequence.request_id)
            self._unheard.append(sequence.request_id)

    def _abort_unheard(self) -> None:
        unheard, self._unheard = self._unheard, []
        for request_id in unheard:
            self.end(request_id, "abort")
