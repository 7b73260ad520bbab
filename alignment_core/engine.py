"""The engine: takes requests from any thread, runs the loop, hands out tokens as they are drawn."""

import asyncio
import itertools
import logging
import queue
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from linalign.alignment_core.cpu.kernels import release_threads
from linalign.alignment_core.decoding.grammars import Grammars
from linalign.alignment_core.decoding.sampling import sample
from linalign.alignment_core.decoding.static_draw import NO_TOKEN
from linalign.alignment_core.decoding.static_sampler import StaticSampler
from linalign.alignment_core.engine_config import EngineConfig, pages_that_fit
from linalign.alignment_core.errors import EngineDead, RequestFailed
from linalign.alignment_core.execution.model_runner import ModelRunner, RunnerConfig
from linalign.alignment_core.loading.loader import LoadedModel, load
from linalign.alignment_core.output import FinishReason, Output, Stats, TokenLogprob, nothing_of
from linalign.alignment_core.pending_step import Drawn, Flight, Sampler, draw
from linalign.alignment_core.request import DEFAULT_RATIO, Principle, Prompt, SamplingParams
from linalign.alignment_core.scheduling.backlog import Backlog
from linalign.alignment_core.scheduling.kv_cache import PagePool
from linalign.alignment_core.scheduling.limits import Limits
from linalign.alignment_core.scheduling.scheduler import SPECULATIVE_BATCH, Scheduler, Step
from linalign.alignment_core.scheduling.sequence import Sequence
from linalign.alignment_core.text.detokenizer import TextStream, TokenBytes, special_ids
from linalign.alignment_core.text.prompts import Message, Placement, PromptBuilder

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model.

    `start` runs the loop in a thread of its own, `stop` ends it; `with` does both. Without them the
    owner may call `step` itself. `submit`, `abort` and `chat` are safe from any thread.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        on_cpu = loaded.model.device.type == "cpu"
        max_num_batched_tokens = config.max_num_batched_tokens
        if max_num_batched_tokens is None:
            max_num_batched_tokens = 128 if on_cpu else 2048
        num_speculative_tokens = config.num_speculative_tokens
        if num_speculative_tokens is None:
            num_speculative_tokens = 0 if on_cpu else 8
        if min(config.max_num_seqs, max_num_batched_tokens, config.page_size) < 1:
            raise ValueError(f"the sizes must be 1 at least: {config}")
        self.model_id = loaded.id
        self.tokenizer = loaded.tokenizer
        self.vocab_size: int = loaded.model.config.get_text_config().vocab_size
        self.max_model_len = config.max_model_len or loaded.max_model_len
        if self.max_model_len > loaded.max_model_len:
            raise ValueError(f"max_model_len is {self.max_model_len}, but the model's context {loaded.max_model_len}")
        static = not on_cpu if config.static is None else config.static
        runner_config = RunnerConfig(
            page_size=config.page_size,
            max_model_len=self.max_model_len,
            max_rows=config.max_num_seqs + max(config.max_num_seqs, SPECULATIVE_BATCH) if static else 0,
            kv_cache_dtype=config.kv_cache_dtype,
            batch_invariant=config.batch_invariant,
            eager=config.enforce_eager,
        )
        self.runner = ModelRunner(loaded.model, runner_config, loaded.followers)
        num_pages = config.num_pages or pages_that_fit(self.runner, config, self.max_model_len, max_num_batched_tokens)
        self.runner.allocate(num_pages)
        self.pool = PagePool(num_pages, self.runner.page_size)
        self._sample: Sampler = sample
        if static:
            sampler = StaticSampler(self.runner)
            if self.runner.captures:
                sampler.warm_up()
            self._sample = sampler.sample
        self.scheduler = Scheduler(self.pool, config.max_num_seqs, max_num_batched_tokens, num_speculative_tokens)
        self._limits = Limits(
            self.vocab_size, self.max_model_len, config.max_num_seqs, max_num_batched_tokens, self.pool
        )
        self.eos_token_ids = frozenset(id for id in loaded.eos_token_ids if id < self.vocab_size)
        self.grammars = Grammars(loaded.tokenizer, self.vocab_size, self.eos_token_ids)
        self.token_bytes = TokenBytes(loaded.tokenizer)
        self._special_ids = special_ids(loaded.tokenizer)
        self.prompts = PromptBuilder(loaded.tokenizer, self.max_model_len)
        self.error: BaseException | None = None
        self._ids = itertools.count()
        self._requests: dict[int, list[Sequence]] = {}  # by id: the choices that have not ended
        self._inbox: deque[Sequence | int] = deque()  # new sequences, and ids to abort
        self._news = threading.Condition()
        self._backlog = Backlog(config.max_queued_requests, config.max_queued_tokens, config.max_num_seqs)
        self._telling = threading.RLock()
        self._draining = self._stopping = False
        self._thread: threading.Thread | None = None
        self._num_drafted = self._num_accepted = self._num_generated = 0
        self._overlaps = static and loaded.followers is None  # they would have to be told the tokens
        self._in_flight: Flight | None = None
        self._step_began: float | None = None
        self._longest_step = 0.0
        if on_cpu:
            release_threads()

    @classmethod
    def load(cls, model: str | None = None, config: EngineConfig | None = None) -> "Engine":
        """An engine over a directory, a hub id, a .gguf file, or the embedded model. Raises LoadingError."""
        return cls(load(model), config)

    # Requests, from any thread

    def chat(
        self,
        messages: Seq[Message],
        principle: str | Seq[Principle] | None = None,
        ratio: float = DEFAULT_RATIO,
        params: SamplingParams | None = None,
        placement: Placement = "system",
    ) -> Iterator[Output]:
        """Answer a chat, output by output as tokens are drawn. Raises InvalidRequest, EngineDead, on the way too, and
        RequestFailed.

        principle: one text, extrapolated by `ratio`, or several Principles with ratios of their own.
        The request is aborted when nobody holds the iterator any more.
        """
        principles = [Principle(principle, ratio=ratio)] if isinstance(principle, str) else principle or ()
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        prompt = self.prompts.build(messages, principles, placement)
        request_id = self.submit(prompt, params or SamplingParams(), outputs.put)
        replies = self._outputs(outputs)
        weakref.finalize(replies, self.abort, request_id)  # also when it was never begun
        return replies

    def _outputs(self, outputs: "queue.SimpleQueue[Output]") -> Iterator[Output]:
        while True:
            output = outputs.get()
            if output.error is not None:
                raise output.error
            if output.finish_reason == "error":
                raise EngineDead("the engine failed during this request") from self.error
            yield output
            if output.finish_reason:
                return

    def submit(self, prompt: Prompt, params: SamplingParams, on_output: Callable[[Output], None], n: int = 1) -> int:
        """Queue a request for n choices; returns its id. Raises EngineDead, EngineBusy, and InvalidRequest at once
        for what can never be served.

        on_output: called from the engine's thread with every Output, each choice's last with a finish_reason.
        """
        max_tokens = self._limits.max_tokens(prompt, params, n)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request_id = next(self._ids)
        before = (*prompt.principled[0], *prompt.given) if prompt.continues else ()
        skipped = self._special_ids if params.skip_special_tokens else frozenset[int]()
        choices = [
            Sequence(
                request_id=request_id,
                prompt=prompt,
                params=params,
                seed=seed,
                max_tokens=max_tokens,
                stop_token_ids=params.stop_token_ids | (frozenset() if params.ignore_eos else self.eos_token_ids),
                eos_token_ids=self.eos_token_ids,
                text=TextStream(self._decode, params.stop, before, skipped),
                on_output=on_output,
                choice=choice,
                matcher=self.grammars.matcher(params.structure) if params.structure else None,
            )
            for choice in range(n)
        ]
        with self._news:
            self.ensure_accepting()
            self._backlog.enter(choices)
            self._inbox.extend(choices)
            self._news.notify()
        return request_id

    async def submit_async(
        self, prompt: Prompt, params: SamplingParams, on_output: Callable[[Output], None], n: int = 1
    ) -> int:
        """`submit`, in a thread, as a structure may have to be compiled. Once it is cancelled, on_output still gets the
        end of every choice.
        """

        def end(submitted: asyncio.Future[int]) -> None:
            if submitted.exception() is None:
                self.abort(submitted.result())
                return
            for choice in range(n):
                on_output(nothing_of(prompt, choice, "abort"))

        pool = self.grammars.pool(params.structure) if params.structure else None
        submitted = asyncio.get_running_loop().run_in_executor(pool, self.submit, prompt, params, on_output, n)
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(end)
            raise

    def refuse_early(self) -> None:
        """Raises EngineDead or EngineBusy where `submit` would, whatever the request; to be asked before work."""
        self.ensure_accepting()
        self._backlog.refuse_if_full()

    def ensure_accepting(self) -> None:
        """Raises EngineDead if the engine has failed, was stopped, or takes no new requests any more."""
        if not self.alive:
            raise EngineDead("the engine is not running") from self.error
        if self._draining:
            raise EngineDead("the server is stopping and takes no new requests")

    async def check_health(self) -> None:
        """Raises EngineDead where `ensure_accepting` does."""
        self.ensure_accepting()

    def drain(self) -> None:
        """Take no new requests; those that are there go on."""
        with self._news:
            self._draining = True

    def abort(self, request_id: int) -> None:
        """End what is still going of a request before the next step; the last Outputs say "abort"."""
        with self._news:
            self._inbox.append(request_id)
            self._news.notify()

    @property
    def alive(self) -> bool:
        return self.error is None and not self._stopping

    @property
    def idle(self) -> bool:
        """Whether every request has ended."""
        return not (self._inbox or self._requests)

    @property
    def pace(self) -> tuple[float | None, float]:
        """When the step at hand has begun, of time.monotonic() (None between steps), and the seconds of the longest
        before it, the first one, which may compile things, left out.
        """
        return self._step_began, self._longest_step

    def stats(self) -> Stats:
        """What is going on, for metrics; from any thread."""
        scheduler, pool = self.scheduler, self.pool
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + sum(isinstance(news, Sequence) for news in self._inbox.copy()),
            kv_cache_usage=1 - pool.num_free / pool.num_pages,
            num_preemptions=scheduler.num_preemptions,
            num_tokens_admitted=scheduler.num_tokens_admitted,
            num_tokens_cached=scheduler.num_tokens_cached,
            num_tokens_drafted=self._num_drafted,
            num_tokens_accepted=self._num_accepted,
            num_tokens_generated=self._num_generated,
        )

    async def all_stats(self) -> dict[str, Stats]:
        """Those of every engine by its name, of which there is one here, and needs none."""
        return {"": self.stats()}

    # The loop

    def start(self) -> "Engine":
        """Run the loop. Raises EngineDead if it has been stopped."""
        if not self.alive:
            raise EngineDead("the engine was stopped")
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the loop after the step at hand; requests that are left get "abort"."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            self._end()

    __enter__ = start

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def step(self) -> bool:
        """One turn of the loop; False if there was nothing to compute."""
        self._take_in()
        if self._in_flight and self.scheduler.awaits_tokens():
            self._land_all()
        step = self.scheduler.schedule(may_draft=self._in_flight is None)
        for sequence in step.admitted:
            self._backlog.leave(sequence)
            sequence.times.admitted = sequence.times.admitted or time.monotonic()
        if not step.rows:
            return self._land_all()
        flight = self._launch(step)
        if self._overlaps and not step.has_drafts:
            for place, sequence in enumerate(step.drawing):
                sequence.expect(place)
            self._land_all()
            self._in_flight = flight
        else:
            self._land(flight)
        return True

    def _launch(self, step: Step) -> Flight:
        """Run the step and draw for every sequence, at its drafts too."""
        logits = self.runner.forward(step)
        self.scheduler.commit(step)
        places = [
            (s, s.num_drawn - len(s.prompt.given) + i) for s in step.drawing for i in range(1 + len(step.drafts(s)))
        ]
        try:
            drawn = [draw(logits, places, self._sample)] if places else []
        except Exception:
            log.exception("A step's tokens could not be drawn together")
        else:
            return Flight(step, drawn)
        return Flight(step, self._draw_apart(step, logits, places))

    def _draw_apart(self, step: Step, logits: Tensor, places: Seq[tuple[Sequence, int]]) -> list[Drawn]:
        """Draw for each sequence alone, which takes less memory too. Those that can't be drawn for end, the others go
        on.
        """
        sizes = [len(sequence.branches) for sequence, _ in places]
        rows = torch.split(logits[: sum(sizes)], sizes)  # fixed shapes have more
        drawn = []
        for sequence in step.drawing:
            mine = [place for place, (s, _) in enumerate(places) if s is sequence]
            try:
                drawn.append(draw(torch.cat([rows[i] for i in mine]), [places[i] for i in mine], sample))
            except Exception as error:
                self._fail(sequence, error)
        step.drawing = [sequence for sequence in step.drawing if not sequence.ended]
        if self._overlaps and drawn:  # the next step looks for them there
            tokens = torch.cat([tokens for tokens, _ in drawn])
            self.runner.drawn[: len(tokens)].copy_(tokens)
        return drawn

    def _land(self, flight: Flight) -> None:
        """Accept the tokens that were drawn, and those drafts that are them; sequences may have ended meanwhile."""
        tokens = flight.wait()
        for sequence in flight.step.drawing:
            drafts = flight.step.drafts(sequence)
            drawn = list(itertools.islice(tokens, 1 + len(drafts)))
            if sequence.ended:
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
                self._num_drafted += len(drafts)
                self._num_accepted += num_accepted

    def _land_all(self) -> bool:
        """Wait for the step that is being computed; False if there is none."""
        flight, self._in_flight = self._in_flight, None
        if flight is not None:
            self._land(flight)
        return flight is not None

    def _loop(self) -> None:
        device = self.runner.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # it is a thread's own
        is_first = True
        try:
            while not self._stopping:
                self._step_began = time.monotonic()
                has_computed = self.step()
                if has_computed and not is_first:
                    self._longest_step = max(self._longest_step, time.monotonic() - self._step_began)
                is_first = is_first and not has_computed
                self._step_began = None
                if not has_computed:
                    with self._news:
                        self._news.wait_for(lambda: self._inbox or self._stopping)
        except BaseException as error:
            log.exception("The engine failed")
            self.error = error
        self._end()

    def give_up(self, error: BaseException) -> None:
        """Tell everyone who waits that the engine is dead, from another thread: the loop's own does not come back."""
        self.error = error
        self._stopping = True
        for sequence in [*itertools.chain(*list(self._requests.values())), *self._inbox.copy()]:
            if isinstance(sequence, Sequence) and not sequence.ended:
                sequence.ended = True
                self._tell(sequence, sequence.last_output("error"))

    def _end(self) -> None:
        """Tell everyone who still waits."""
        with self._news:
            self._stopping = True  # from here on submit refuses, so what is taken in now is all there is
        self._take_in()
        for sequence in list(itertools.chain(*self._requests.values())):
            self._break_off(sequence, "error" if self.error else "abort")

    def _take_in(self) -> None:
        while self._inbox:
            news = self._inbox[0]
            if isinstance(news, Sequence):
                self._requests.setdefault(news.request_id, []).append(news)
                self.scheduler.add(news)
            else:
                for sequence in self._requests.get(news, [])[:]:
                    self._break_off(sequence, "abort")
            self._inbox.popleft()  # at last, so that `idle` overlooks nothing

    def _break_off(self, sequence: Sequence, reason: FinishReason) -> None:
        """`_finish`, where what goes wrong ends this sequence alone."""
        try:
            self._finish(sequence, reason)
        except Exception as error:
            self._fail(sequence, error)

    def _accepts(self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprob, ...]) -> bool:
        """`_accept`, where what goes wrong ends this sequence alone."""
        try:
            return self._accept(sequence, token, logprobs)
        except Exception as error:
            self._fail(sequence, error)
            return False

    def _accept(self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprob, ...] = ()) -> bool:
        """Add a token to the reply; False if the reply ends with it. Raises RequestFailed."""
        if token == NO_TOKEN:
            raise RequestFailed("the model's logits are not finite here, so no token can be drawn")
        sequence.append(token)
        is_given = sequence.num_replied <= 0
        if not is_given:
            sequence.times.first_token = sequence.times.first_token or time.monotonic()
        self._num_generated += not is_given
        may_stop = not is_given and sequence.num_replied > sequence.params.min_tokens
        is_stop = ended = may_stop and token in sequence.stop_token_ids
        is_end = is_stop or (sequence.matcher is not None and token in sequence.eos_token_ids)
        text = "" if is_end or is_given else sequence.text.add(token, may_stop)
        if sequence.matcher is not None and not is_stop and not is_given:
            sequence.matcher.consume_token(token)
            ended = sequence.matcher.is_stopped()
        reason: FinishReason | None = None
        error = None
        if sequence.params.structure and sequence.matcher and sequence.matcher.is_error():
            reason, error = "error", self.grammars.failure(sequence.params.structure, sequence.matcher)
        elif ended or sequence.text.stopped:
            reason = "stop"
        elif len(sequence.output_ids) >= sequence.max_tokens:
            reason = "length"
        news = Output(text, (token,), reason, None, sequence.choice, () if is_stop else logprobs, error)
        if reason:
            self._finish(sequence, reason, news)
        else:
            self._tell(sequence, news)
        return reason is None

    def _finish(self, sequence: Sequence, reason: FinishReason, news: Output | None = None) -> None:
        """news: of the last token, if there is any."""
        rest = sequence.text.finish()
        self._forget(sequence)
        if sequence.text.stopped:
            reason = "stop"
        last = sequence.last_output(reason, news)
        self._tell(sequence, replace(last, text=last.text + rest))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End one sequence in which something went wrong, as far as it has not ended already."""
        log.error("Request %d failed", sequence.request_id, exc_info=error)
        if sequence.ended:
            return
        for branch in sequence.branches:
            self.pool.unpublish(branch)
        self._forget(sequence)
        unknown = RequestFailed("the server failed in this request; others are not affected")
        failed = error.with_traceback(None) if isinstance(error, RequestFailed) else unknown  # its frames hold much
        self._tell(sequence, replace(sequence.last_output("error"), error=failed))

    def _forget(self, sequence: Sequence) -> None:
        choices = self._requests[sequence.request_id]
        choices.remove(sequence)
        if not choices:
            del self._requests[sequence.request_id]
        sequence.ended = True
        self._backlog.leave(sequence)
        self.scheduler.remove(sequence)

    def _tell(self, sequence: Sequence, output: Output) -> None:
        """Nothing after the end, which `give_up` may tell from another thread at any moment."""
        try:
            with self._telling:
                if not sequence.was_told:
                    sequence.was_told = output.finish_reason is not None
                    sequence.on_output(output)
        except Exception:  # the listener's own: it harms nobody else
            log.exception("The listener of request %d failed", sequence.request_id)
            self.abort(sequence.request_id)

    def _decode(self, ids: Seq[int]) -> str:
        text = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
