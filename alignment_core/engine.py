"""The engine: takes requests from any thread, and runs the loop in its own thread."""

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
from types import TracebackType

import torch

from linalign.alignment_core.assembly import Sizes, build_loop
from linalign.alignment_core.cpu.kernels import release_threads
from linalign.alignment_core.decoding.grammars import Grammars
from linalign.alignment_core.decoding.thinking import ThinkingBudget
from linalign.alignment_core.engine_config import EngineConfig
from linalign.alignment_core.errors import EngineDead
from linalign.alignment_core.loading.loader import LoadedModel, load
from linalign.alignment_core.output import Output, Stats
from linalign.alignment_core.request import DEFAULT_RATIO, Principle, Prompt, SamplingParams
from linalign.alignment_core.scheduling.limits import Limits
from linalign.alignment_core.scheduling.sequence import OutputChannel, Sequence
from linalign.alignment_core.text.detokenizer import TextStream, TokenBytes, special_ids
from linalign.alignment_core.text.prompts import Message, Placement, PromptBuilder

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model.

    `start` runs the loop in a thread, `stop` ends it; `with` does both. Without them the owner may call `step`
    itself. `submit`, `abort` and `chat` are safe from any thread.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        """Raises ValueError for invalid sizes, and for a model that can't be served."""
        config = config or EngineConfig()
        sizes = Sizes.of(config, loaded)
        self.model_id = loaded.id
        self.tokenizer = loaded.tokenizer
        self.vocab_size: int = loaded.model.config.get_text_config().vocab_size
        self.max_model_len = sizes.max_model_len
        self.loop = build_loop(loaded, config, sizes)
        self.runner = self.loop.runner
        self.scheduler = self.loop.scheduler
        self.pool = self.scheduler.pool
        self.backlog = self.loop.backlog
        self.eos_token_ids = frozenset(id for id in loaded.eos_token_ids if id < self.vocab_size)
        self.grammars = Grammars(loaded.tokenizer, self.vocab_size, self.eos_token_ids)
        self.token_bytes = TokenBytes(loaded.tokenizer)
        self.prompts = PromptBuilder(loaded.tokenizer, self.max_model_len)
        self.error: BaseException | None = None  # what has ended the loop
        self._limits = Limits(
            self.vocab_size, self.max_model_len, config.max_num_seqs, sizes.max_num_batched_tokens, self.pool
        )
        self._special_ids = special_ids(loaded.tokenizer)
        self._ids = itertools.count()  # of requests
        self._inbox: deque[Sequence | int] = deque()  # new sequences, and ids of requests to abort, for the loop
        self._wake = threading.Condition()  # the loop waits on it; guards _inbox, _is_draining and _is_stopping
        self._is_draining = self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._step_began: float | None = None  # time.monotonic() of the current step
        self._longest_step = 0.0  # seconds, without the first step
        if self.runner.model.device.type == "cpu":
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
        """Answer a chat. Yields an output for each step that draws a token.

        principle: one text, extrapolated by `ratio`, or several Principles with their own ratios.
        The request is aborted when the iterator is garbage collected.
        Raises InvalidRequest and EngineDead, also during iteration, and RequestFailed during iteration.
        """
        principles = [Principle(principle, ratio=ratio)] if isinstance(principle, str) else principle or ()
        outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        prompt = self.prompts.build(messages, principles, placement)
        request_id = self.submit(prompt, params or SamplingParams(), outputs.put)
        replies = self._outputs(outputs)
        weakref.finalize(replies, self.abort, request_id)  # also if iteration never begins
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
        """Queue a request for n choices; returns its id.

        on_output: called from the engine's thread with every Output. The last one of each choice has a finish_reason.
        Raises EngineDead, EngineBusy, and InvalidRequest for a request that can never be served.
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
                text=TextStream(self._decode, params.stop, before, skipped, params.uncut),
                outputs=OutputChannel(on_output),
                choice=choice,
                matcher=self.grammars.matcher(params.structure) if params.structure else None,
                thinking=ThinkingBudget(params.thinking, self.token_bytes) if params.thinking else None,
            )
            for choice in range(n)
        ]
        with self._wake:
            self.ensure_accepting()
            self.backlog.enter(choices)
            self._inbox.extend(choices)
            self._wake.notify()
        return request_id

    def abort(self, request_id: int) -> None:
        """End the unfinished choices of a request before the next step. Their last Outputs have the reason "abort"."""
        with self._wake:
            self._inbox.append(request_id)
            self._wake.notify()

    def refuse_early(self) -> None:
        """Raises EngineDead or EngineBusy if `submit` would refuse any request. Call it before expensive work."""
        self.ensure_accepting()
        self.backlog.refuse_if_full()

    def ensure_accepting(self) -> None:
        """Raises EngineDead if the engine has failed, was stopped, or drains."""
        if not self.alive:
            raise EngineDead("the engine is not running") from self.error
        if self._is_draining:
            raise EngineDead("the server is stopping and takes no new requests")

    # State, from any thread

    @property
    def alive(self) -> bool:
        return self.error is None and not self._is_stopping

    @property
    def idle(self) -> bool:
        """Whether every request has ended."""
        return not (self._inbox or self.loop.requests)

    @property
    def pace(self) -> tuple[float | None, float]:
        """time.monotonic() at the beginning of the current step (None between steps), and the seconds of the longest
        step so far. The first step, which may compile, does not count.
        """
        return self._step_began, self._longest_step

    def stats(self) -> Stats:
        scheduler, pool, loop = self.scheduler, self.pool, self.loop
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + sum(isinstance(item, Sequence) for item in self._inbox.copy()),
            kv_cache_usage=1 - pool.num_free / pool.num_pages,
            num_preemptions=scheduler.num_preemptions,
            num_tokens_admitted=scheduler.num_tokens_admitted,
            num_tokens_cached=scheduler.num_tokens_cached,
            num_tokens_drafted=loop.num_drafted,
            num_tokens_accepted=loop.num_accepted,
            num_tokens_generated=loop.num_generated,
        )

    # The thread

    def start(self) -> "Engine":
        """Run the loop. Raises EngineDead if the engine was stopped."""
        if not self.alive:
            raise EngineDead("the engine was stopped")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return self

    def drain(self) -> None:
        """Refuse new requests. Accepted ones continue."""
        with self._wake:
            self._is_draining = True

    def stop(self) -> None:
        """End the loop after the current step. Unfinished requests end with the reason "abort"."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            self._end()

    def give_up(self, error: BaseException) -> None:
        """End all requests with an error, from another thread, because a step of the loop hangs."""
        self.error = error
        self._is_stopping = True
        for sequence in [*itertools.chain(*list(self.loop.requests.values())), *self._inbox.copy()]:
            if isinstance(sequence, Sequence):
                try:
                    sequence.outputs.send(sequence.last_output("error"))
                except Exception:
                    log.exception("The listener of request %d failed", sequence.request_id)

    __enter__ = start

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def step(self) -> bool:
        """Hand the inbox to the loop and run one step; False if there was nothing to compute."""
        self._empty_inbox()
        return self.loop.step()

    def _run(self) -> None:
        device = self.runner.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a setting of each thread
        is_first = True
        try:
            while not self._is_stopping:
                self._step_began = time.monotonic()
                has_computed = self.step()
                if has_computed and not is_first:
                    self._longest_step = max(self._longest_step, time.monotonic() - self._step_began)
                is_first = is_first and not has_computed
                self._step_began = None
                if not has_computed:
                    with self._wake:
                        self._wake.wait_for(lambda: self._inbox or self._is_stopping)
        except BaseException as error:
            log.exception("The engine failed")
            self.error = error
        self._end()

    def _empty_inbox(self) -> None:
        while self._inbox:
            item = self._inbox[0]
            if isinstance(item, Sequence):
                self.loop.add(item)
            else:
                self.loop.end(item, "abort")
            self._inbox.popleft()  # last, so that `idle` never misses an item

    def _end(self) -> None:
        """End all requests."""
        with self._wake:
            self._is_stopping = True  # `submit` refuses from here on, so the inbox stays empty
        self._empty_inbox()
        for request_id in list(self.loop.requests):
            self.loop.end(request_id, "error" if self.error else "abort")

    def _decode(self, ids: Seq[int]) -> str:
        text = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
