"""The engine as the HTTP server sees it, where engines are replicas of a Ray deployment."""

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

ATTEMPTS = 6  # with replicas that turn out to be dead
LOSSES = 2  # replicas that a request may be lost with: it may be what ends them
PAUSE = 0.25  # seconds before the second attempt, twice that before the third, and so on
PATIENCE = 0.5  # seconds for replicas to say how they are: a full one has to end a request before Ray lets it
RECENT = 2.0  # seconds for which nobody is asked who has said it
FRESH = 10.0  # seconds for which it holds where nobody answers


class ClusterBusy(RuntimeError):
    """Every replica is full, and so is the queue. retry_after: seconds after which it is worth another try."""

    def __init__(self, retry_after: float | None) -> None:
        super().__init__("every replica is busy; try again later")
        self.retry_after = math.ceil(retry_after or 1)


@dataclass(frozen=True, slots=True)
class Description:
    """What is to be known of a model in order to serve it: its name, and how text becomes tokens."""

    model_id: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class News:
    """Of one request, from its replica; none at first, which says that the engine has taken it in. clock: the
    replica's time.monotonic(), which tells times on another machine nothing. stats: the replica's, now and then.
    """

    outputs: tuple[Output, ...]
    clock: float
    stats: tuple[str, Stats] | None


@dataclass(slots=True)
class Request:
    """What is asked for, and how far it is. num_tokens: of each choice that has not ended. accepted: done when a first
    replica has taken it in. is_taken_in: by the one at hand.
    """

    prompt: Prompt
    params: SamplingParams
    on_output: Callable[[Output], None]
    num_tokens: dict[int, int]
    accepted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_taken_in: bool = False
    has_begun: bool = False

    def take(self, news: News) -> None:
        """Raises EngineDead instead of handing out that the engine has failed."""
        self.is_taken_in = True
        if not self.accepted.done():
            self.accepted.set_result(None)
        lag = time.monotonic() - news.clock
        for output in news.outputs:
            if output.finish_reason == "error" and output.error is None:
                raise EngineDead("the engine failed during this request")
            self.has_begun = True
            self.num_tokens[output.choice] += len(output.token_ids)
            if output.finish_reason:
                del self.num_tokens[output.choice]
            self.on_output(replace(output, times=output.times and output.times.later(lag)))

    def end(self, reason: FinishReason) -> None:
        """Tell that the choices that are left have ended, and why."""
        while self.num_tokens:
            choice, num_tokens = self.num_tokens.popitem()
            self.on_output(terminal_output(self.prompt, choice, reason, num_tokens))


class RemoteEngine:
    """An `EngineClient` over the replicas behind a handle of `EngineReplica`.

    A request goes to one replica, with all its branches and choices. If that one dies before anything has come of the
    request, another gets it; afterwards, the choices that are left end with "error".
    """

    def __init__(self, handle: DeploymentHandle[Any], description: Description) -> None:
        self.model_id = description.model_id
        self.tokenizer = description.tokenizer
        self.vocab_size = description.vocab_size
        self.max_model_len = description.max_model_len
        self.prompts = PromptBuilder(description.tokenizer, description.max_model_len)
        self.token_bytes = TokenBytes(description.tokenizer)
        self._handle = handle
        self._ids = itertools.count()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._stats: dict[str, tuple[float, Stats]] = {}  # the newest of every replica, and when it came
        self._asking: asyncio.Task[None] | None = None

    def __enter__(self) -> "RemoteEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in [*self._running.values(), *filter(None, [self._asking])]:
            task.cancel()

    def refuse_early(self) -> None:
        """Nothing: whether there is room turns out when a replica is looked for."""

    async def submit(
        self, prompt: Prompt, params: SamplingParams, on_output: Callable[[Output], None], n: int = 1
    ) -> int:
        """Until a replica has taken the request in. Raises ClusterBusy, EngineDead, InvalidRequest."""
        request = Request(prompt, params, on_output, dict.fromkeys(range(n), 0))
        request_id = next(self._ids)
        self._running[request_id] = task = asyncio.create_task(self._run(request))
        task.add_done_callback(lambda _: self._running.pop(request_id, None))
        try:
            await request.accepted
        except asyncio.CancelledError:
            task.cancel()
            request.end("abort")  # also where the task has come to its end meanwhile
            raise
        return request_id

    def abort(self, request_id: int) -> None:
        if task := self._running.get(request_id):
            task.cancel()

    async def check_health(self) -> None:
        """Raises EngineDead unless a replica has been well within the last seconds."""
        if not self._told_within(RECENT) and not await self.all_stats():
            raise EngineDead("no replica can be reached")

    async def all_stats(self) -> dict[str, Stats]:
        """Of the replicas that are there and well, by their ids: what they say, or have said with their news."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait([self._asking], timeout=PATIENCE)  # one question at a time, however many want to know
        return self._told_within(FRESH)

    def _told_within(self, seconds: float) -> dict[str, Stats]:
        oldest = time.monotonic() - seconds
        return {id: stats for id, (when, stats) in self._stats.items() if when >= oldest}

    async def _ask(self) -> None:
        """Forgets those that do not answer."""
        asked = time.monotonic()
        try:
            answers = await self._handle.broadcast("stats").results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            answers = []
        told = {id: (asked, stats) for id, stats in (a for a in answers if not isinstance(a, BaseException))}
        self._stats = {id: max(one, self._stats.get(id, one), key=lambda o: o[0]) for id, one in told.items()}

    async def _run(self, request: Request) -> None:
        """From replica to replica until the request is done, or was lost with one that had begun it."""
        num_attempts = num_losses = 0
        try:
            while True:
                request.is_taken_in = False
                try:
                    async with contextlib.aclosing(self._news(request)) as stream:
                        async for news in stream:
                            request.take(news)
                    return
                except ClusterBusy:
                    if not request.accepted.done():
                        raise
                except EngineDead as error:
                    num_attempts += 1
                    num_losses += request.is_taken_in
                    if request.has_begun or num_losses == LOSSES or num_attempts == ATTEMPTS:
                        raise
                    log.warning("A request goes to another replica: %s", error)
                await asyncio.sleep(PAUSE * 2 ** (num_attempts - 1))
        except asyncio.CancelledError:  # here, or by Ray, which cancels with a request what was called for it
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

    async def _news(self, request: Request) -> AsyncGenerator[News]:
        """What one replica makes of the request; it is told if nobody listens any more. Raises ClusterBusy, EngineDead
        if the replica is lost, and InvalidRequest.
        """
        stream: Any = None
        try:
            generate = self._handle.options(stream=True).generate
            stream = generate.remote(request.prompt, request.params, len(request.num_tokens))
            async for news in stream:
                if news.stats:
                    self._stats[news.stats[0]] = time.monotonic(), news.stats[1]
                yield news
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
                with contextlib.suppress(Exception):  # Ray raises here what the call has failed with
                    stream.cancel()
