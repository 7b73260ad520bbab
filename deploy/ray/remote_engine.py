"""The EngineClient of a server whose engines are replicas of a Ray deployment."""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from transformers import PreTrainedTokenizerBase

from linalign import EngineBusy, EngineDead, Output, Prompt, SamplingParams
from linalign.alignment_core.output import FinishReason, Stats, terminal_output
from linalign.alignment_core.text.detokenizer import TokenBytes
from linalign.alignment_core.text.prompts import PromptBuilder
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 6  # with dead replicas
MAX_LOSSES = 2  # replicas that may die with a request: the request may be the cause
FIRST_PAUSE = 0.25  # seconds before the second attempt; each further pause is twice as long
STATS_TIMEOUT = 0.5  # seconds for replicas to answer; a full one must end a request before it can
HEALTHY_FOR = 2.0  # seconds after an answer during which a replica is not asked again
STATS_VALID_FOR = 10.0  # seconds after an answer during which the stats of a silent replica are used


class ClusterBusy(RuntimeError):
    """Every replica is full, and so is the queue. retry_after: Seconds after which a retry may succeed."""

    def __init__(self, retry_after: float | None) -> None:
        super().__init__("every replica is busy; try again later")
        self.retry_after = math.ceil(retry_after or 1)


@dataclass(frozen=True, slots=True)
class Description:
    """What a server must know of the model of its replicas."""

    model_id: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int
    num_pages: int
    page_size: int


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """A message of a replica about one request. The first one has no outputs: the engine has accepted the request."""

    outputs: tuple[Output, ...]
    clock: float  # time.monotonic() of the replica, whose clock differs from that of other machines
    stats: tuple[str, Stats] | None  # the replica's id and stats, from time to time


@dataclass(slots=True)
class Request:
    """A request and its progress."""

    prompt: Prompt
    params: SamplingParams
    on_output: Callable[[Output], None]
    num_tokens: dict[int, int]  # of each choice that has not ended
    accepted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_accepted: bool = False  # by the current replica; `accepted` is done once any replica has accepted the request
    has_begun: bool = False  # whether there was an output

    def take(self, message: StepOutputs) -> None:
        """Hand outputs to the listener. Raises EngineDead instead if the engine has failed."""
        self.is_accepted = True
        if not self.accepted.done():
            self.accepted.set_result(None)
        lag = time.monotonic() - message.clock
        for output in message.outputs:
            if output.finish_reason == "error" and output.error is None:
                raise EngineDead("the engine failed during this request")
            self.has_begun = True
            self.num_tokens[output.choice] += len(output.token_ids)
            if output.finish_reason:
                del self.num_tokens[output.choice]
            self.on_output(replace(output, times=output.times and output.times.later(lag)))

    def end(self, reason: FinishReason) -> None:
        """End the unfinished choices."""
        while self.num_tokens:
            choice, num_tokens = self.num_tokens.popitem()
            self.on_output(terminal_output(self.prompt, choice, reason, num_tokens))


class RemoteEngine:
    """An `EngineClient` over the replicas behind a handle of `EngineReplica`.

    A request goes to one replica, with all its branches and choices. If the replica dies before the first output, the
    request goes to another one. If it dies later, the unfinished choices end with "error".
    """

    def __init__(self, handle: DeploymentHandle[Any], description: Description) -> None:
        self.model_id = description.model_id
        self.tokenizer = description.tokenizer
        self.vocab_size = description.vocab_size
        self.max_model_len = description.max_model_len
        self.num_pages = description.num_pages
        self.page_size = description.page_size
        self.prompts = PromptBuilder(description.tokenizer, description.max_model_len)
        self.token_bytes = TokenBytes(description.tokenizer)
        self._handle = handle
        self._ids = itertools.count()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._stats: dict[str, tuple[float, Stats]] = {}  # the newest stats of every replica, and when they came
        self._asking: asyncio.Task[None] | None = None

    def __enter__(self) -> "RemoteEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in [*self._running.values(), *filter(None, [self._asking])]:
            task.cancel()

    def refuse_early(self) -> None:
        """No check: Ray finds out whether a replica has room when the request is routed."""

    async def submit(
        self, prompt: Prompt, params: SamplingParams, on_output: Callable[[Output], None], n: int = 1
    ) -> int:
        """Returns when a replica has accepted the request. Raises ClusterBusy, EngineDead, InvalidRequest."""
        request = Request(prompt, params, on_output, dict.fromkeys(range(n), 0))
        request_id = next(self._ids)
        self._running[request_id] = task = asyncio.create_task(self._run(request))
        task.add_done_callback(lambda _: self._running.pop(request_id, None))
        try:
            await request.accepted
        except asyncio.CancelledError:
            task.cancel()
            request.end("abort")  # also if the task has ended meanwhile
            raise
        return request_id

    def abort(self, request_id: int) -> None:
        if task := self._running.get(request_id):
            task.cancel()

    async def check_health(self) -> None:
        """Raises EngineDead unless a replica was healthy within the last seconds."""
        if not self._stats_within(HEALTHY_FOR) and not await self.all_stats():
            raise EngineDead("no replica can be reached")

    async def all_stats(self) -> dict[str, Stats]:
        """The stats of healthy replicas by their ids: their answers, or the stats that came with outputs."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait([self._asking], timeout=STATS_TIMEOUT)  # all callers share one question
        return self._stats_within(STATS_VALID_FOR)

    def _stats_within(self, seconds: float) -> dict[str, Stats]:
        oldest = time.monotonic() - seconds
        return {id: stats for id, (when, stats) in self._stats.items() if when >= oldest}

    async def _ask(self) -> None:
        """Ask all replicas for their stats. Replicas that do not answer are forgotten."""
        time_asked = time.monotonic()
        try:
            answers = await self._handle.broadcast("stats").results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            answers = []
        stats_of = {id: (time_asked, stats) for id, stats in (a for a in answers if not isinstance(a, BaseException))}
        self._stats = {id: max(one, self._stats.get(id, one), key=lambda o: o[0]) for id, one in stats_of.items()}

    async def _run(self, request: Request) -> None:
        """Run the request on one replica after the other, until it ends or is lost with a replica that had begun it."""
        num_attempts = num_losses = 0
        try:
            while True:
                request.is_accepted = False
                try:
                    async with contextlib.aclosing(self._outputs_of(request)) as stream:
                        async for message in stream:
                            request.take(message)
                    return
                except ClusterBusy:
                    if not request.accepted.done():
                        raise
                except EngineDead as error:
                    num_attempts += 1
                    num_losses += request.is_accepted
                    if request.has_begun or num_losses == MAX_LOSSES or num_attempts == MAX_ATTEMPTS:
                        raise
                    log.warning("A request moves to another replica: %s", error)
                await asyncio.sleep(FIRST_PAUSE * 2 ** (num_attempts - 1))
        except asyncio.CancelledError:  # by us, or by Ray, which cancels the calls of a cancelled request
            if request.accepted.done():
                request.end("abort")
            else:
                request.accepted.set_exception(EngineDead("the request was cancelled"))
            raise
        except Exception as error:
            if request.accepted.done():
                log.error("A request has failed: %s", error)
                request.end("error")
            else:
                request.accepted.set_exception(error)

    async def _outputs_of(self, request: Request) -> AsyncGenerator[StepOutputs]:
        """The messages of one replica about the request. The replica is notified if the caller stops iterating.

        Raises ClusterBusy, InvalidRequest, and EngineDead if the replica is lost.
        """
        stream: Any = None
        try:
            generate = self._handle.options(stream=True).generate
            stream = generate.remote(request.prompt, request.params, len(request.num_tokens))
            async for message in stream:
                if message.stats:
                    self._stats[message.stats[0]] = time.monotonic(), message.stats[1]
                yield message
            stream = None
        except BackPressureError as error:
            raise ClusterBusy(error.retry_after_s) from None
        except RayTaskError as error:
            if isinstance(error.cause, EngineBusy):
                raise ClusterBusy(error.cause.retry_after) from None
            raise error.cause from None
        except (RayActorError, DeploymentUnavailableError) as error:
            raise EngineDead("the engine's replica was lost") from error
        finally:
            if stream is not None:
                with contextlib.suppress(Exception):  # Ray raises the error of the call here
                    stream.cancel()
