"""The application with engines that fail on demand, and a router that ignores prompts."""

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray.serve import Application
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from linalign import Prompt, SamplingParams
from linalign.ray import application
from linalign.ray.remote_engine import StepOutputs
from linalign.server.settings import Settings

# Seeds of requests that make their engine fail, once each, while $FAULTS contains a file of that name. An engine that
# stalls hangs too, but its watchdog does not notice.
DIES, HANGS, STALLS = 13, 14, 15
HOLD = "hold"  # while $FAULTS contains a file of this name, requests start and then continue slowly
NUM_FIRST_TOKENS = 3  # tokens that a request gets immediately then: enough for a piece of text
PAUSE = 0.6  # seconds before each later token; short enough for the replica to answer stats calls


def _raise(*_: object) -> None:
    raise RuntimeError("injected")


def _sleep(*_: object) -> None:
    time.sleep(10**6)


class Faulty(application.EngineReplica):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._step_at_once, self._engine.step = self._engine.step, self._step

    def _step(self) -> bool:
        engine, hold, until = self._engine, Path(os.environ["FAULTS"]) / HOLD, time.monotonic() + PAUSE
        while hold.exists() and time.monotonic() < until:
            sequences = [*engine.scheduler.running, *engine.scheduler.waiting]
            if engine._inbox or engine._is_stopping or any(s.num_drawn < NUM_FIRST_TOKENS for s in sequences):
                break
            time.sleep(0.01)
        return self._step_at_once()

    async def generate(self, prompt: Prompt, params: SamplingParams, n: int) -> AsyncIterator[StepOutputs]:
        for seed, fault in ((DIES, _raise), (HANGS, _sleep), (STALLS, _sleep)):
            trigger = Path(os.environ["FAULTS"]) / str(seed)
            if params.seed == seed and trigger.exists():
                trigger.unlink()
                self._engine.runner.forward = fault
                if seed == STALLS:
                    self._engine._longest_step = 10**6  # so the watchdog tolerates the step
        async for message in super().generate(prompt, params, n):
            yield message


def build(args: dict[str, Any]) -> Application:
    application.EngineReplica = Faulty  # only in the process that builds the application
    return application.build(args)


class RoundRobin(RequestRouter):
    def initialize_state(self) -> None:
        self._turn = 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        self._turn += 1
        replicas = sorted(candidate_replicas, key=lambda replica: str(replica.replica_id))
        return [[replicas[(self._turn + i) % len(replicas)]] for i in range(len(replicas))]
