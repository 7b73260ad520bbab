"""The Ray Serve application: `serve run linalign.ray.application:build`, or deploy/ray/cpu.yaml."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from linalign import EngineDead, Output, Prompt, SamplingParams
from linalign.alignment_core.output import Stats
from linalign.ray.remote_engine import ClusterBusy, Description, RemoteEngine, StepOutputs
from linalign.server import logs
from linalign.server.app import create_app
from linalign.server.command_line import describe_errors
from linalign.server.commands.serve import build_engine
from linalign.server.local_engine import LocalEngine
from linalign.server.presets import load_presets
from linalign.server.protocol.errors import error_response
from linalign.server.settings import Settings
from linalign.server.settings_loading import check_variables
from linalign.server.shutdown import step_timeout
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

# Settings of `linalign serve` that have no effect here, and the options of Ray Serve that replace them.
FOREIGN = {
    "host": "http_options.host",
    "port": "http_options.port",
    "forwarded_allow_ips": "a proxy in front of Ray's",
    "shutdown_timeout": "graceful_shutdown_timeout_s of both deployments",
    "config": "args of the application",
}
PREFIX_ROUTER = "linalign.ray.prefix_router.PrefixRouter"
STATS_INTERVAL = 0.5  # seconds between stats that a replica sends with its outputs
SHUTDOWN_TIMEOUT = 300.0  # seconds for running replies when a replica is removed
ERROR_DELIVERY_TIME = 1.0  # seconds to send errors to the requests of a dead engine


class EngineReplica:
    """One engine with all of its GPUs. Raises LoadingError, ValueError."""

    def __init__(self, settings: Settings) -> None:
        logs.configure(settings.log_format)
        self._engine = build_engine(settings).start()
        self._client = LocalEngine(self._engine)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._sent = 0.0  # time.monotonic() when the stats were sent last

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.stop()

    def describe(self) -> Description:
        engine = self._engine
        return Description(
            engine.model_id,
            engine.tokenizer,
            engine.vocab_size,
            engine.max_model_len,
            engine.pool.num_pages,
            engine.pool.page_size,
        )

    def record_replica_metadata(self) -> dict[str, int]:
        """Called by Ray once, for routers."""
        return {"num_pages": self._engine.pool.num_pages}

    def stats(self) -> tuple[str, Stats]:
        """The replica's id and stats. Raises EngineDead."""
        self.check_health()
        return self._id, self._engine.stats()

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica after three failures. Raises EngineDead."""
        began, longest = self._engine.pace
        if began is not None and time.monotonic() - began > step_timeout(longest):
            self._engine.give_up(EngineDead("a step has not finished in time"))
        self._engine.ensure_accepting()

    async def generate(self, prompt: Prompt, params: SamplingParams, n: int) -> AsyncIterator[StepOutputs]:
        """Run one request until its choices have ended, or the caller stops iterating. Raises EngineDead, EngineBusy,
        InvalidRequest.

        If the engine dies, the process exits, so that Ray routes no requests here before it has replaced the replica.
        """
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue[Output]()

        def on_output(output: Output) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        request_id, num_unfinished = None, n
        try:
            request_id = await self._client.submit(prompt, params, on_output, n)
            yield self._step_outputs()
            while num_unfinished:
                new = [await outputs.get()]
                new += [outputs.get_nowait() for _ in range(outputs.qsize())]
                num_unfinished -= sum(output.finish_reason is not None for output in new)
                yield self._step_outputs(*new)
        finally:
            if request_id is not None and num_unfinished:
                self._engine.abort(request_id)
            if not self._engine.alive:
                loop.call_later(ERROR_DELIVERY_TIME, os._exit, 1)

    def _step_outputs(self, *outputs: Output) -> StepOutputs:
        now = time.monotonic()
        is_time = now - self._sent >= STATS_INTERVAL and self._engine.alive
        self._sent = now if is_time else self._sent
        return StepOutputs(outputs, now, (self._id, self._engine.stats()) if is_time else None)


@serve.ingress()
class Ingress:
    """The HTTP server, without a model."""

    def __init__(self, engines: "DeploymentHandle[EngineReplica]", settings: Settings) -> None:
        logs.configure(settings.log_format)
        self._engines, self._settings = engines, settings

    async def __serve_build_asgi_app__(self) -> FastAPI:
        description: Description = await self._engines.describe.remote()
        app = create_app(RemoteEngine(self._engines, description), self._settings)
        app.add_exception_handler(ClusterBusy, _on_cluster_busy)
        return app


async def _on_cluster_busy(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ClusterBusy)
    response = error_response(503, str(error), code="overloaded", kind="server_error")
    response.headers["Retry-After"] = str(error.retry_after)
    return response


def build(args: dict[str, Any]) -> Application:
    """The application. args: Settings of `linalign serve`, which override variables LINALIGN_*. Raises ValueError.

    Each engine has tensor_parallel_size GPUs of one machine or, for device "cpu", as many CPUs. A configuration of Ray
    Serve can override these and all other options that are set here.
    """
    if foreign := sorted(args.keys() & FOREIGN.keys()):
        raise ValueError("; ".join(f"{name} has no effect here: see {FOREIGN[name]}" for name in foreign))
    check_variables()
    try:
        settings = Settings(**args)
    except ValidationError as error:
        raise ValueError(describe_errors(error)) from None  # pydantic's own message shows the input, keys included
    load_presets(settings.presets)  # raises early
    engines = serve.deployment(
        name="EngineReplica",
        max_ongoing_requests=settings.max_num_seqs,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config=BackpressureConfig(retry_after_s=5),
        request_router_config={"request_router_class": PREFIX_ROUTER},
        health_check_period_s=5,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT,
        **_resources(settings),
    )(EngineReplica)
    # The ingress refuses excess requests and checks keys, so the engines do neither.
    settings = settings.model_copy(update={"host": "0.0.0.0"})  # Ray's proxies listen, and clients address those
    behind = settings.model_copy(update={"api_keys": (), "max_queued_requests": sys.maxsize})
    ingress = serve.deployment(
        name="Ingress", max_ongoing_requests=10_000, graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT + ERROR_DELIVERY_TIME
    )(Ingress)
    return ingress.bind(engines.bind(behind), settings)


def _resources(settings: Settings) -> dict[str, Any]:
    """The resources of an engine; a placement group if it has several processes."""
    size = settings.tensor_parallel_size
    needs = {"num_cpus": size, "num_gpus": 0 if settings.device == "cpu" else size}
    options: dict[str, Any] = {"ray_actor_options": needs}
    if size > 1:
        bundle = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"]}
        options["placement_group_bundles"] = [{name: number for name, number in bundle.items() if number}]
        options["placement_group_strategy"] = "STRICT_PACK"
    return options
