"""GET /metrics: the engine's counts for Prometheus, read when they are asked for."""

from collections.abc import Iterable

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from alignment_core import Engine

router = APIRouter()


class EngineCollector(Collector):
    """vLLM's names with our prefix."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        for name, text, value in (
            ("num_requests_running", "Sequences in the running batch", stats.num_running),
            ("num_requests_waiting", "Sequences that wait for admission", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the KV cache's pages that are held, 0 to 1", stats.kv_cache_usage),
        ):
            yield GaugeMetricFamily(f"linalign:{name}", text, value)
        for name, text, value in (
            ("generation_tokens", "Tokens generated, once a sequence", stats.num_tokens_generated),
            ("num_preemptions", "Sequences preempted", stats.num_preemptions),
            ("prefix_cache_queries", "Context tokens admitted, all branches", stats.num_tokens_admitted),
            ("spec_decode_num_draft_tokens", "Tokens drafted by prompt lookup", stats.num_tokens_drafted),
            ("spec_decode_num_accepted_tokens", "Drafted tokens that were drawn", stats.num_tokens_accepted),
            ("prefix_cache_hits", "Context tokens that prefix reuse spared", stats.num_tokens_cached),
        ):
            yield CounterMetricFamily(f"linalign:{name}", text, value)


def registry_of(engine: Engine) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    return registry


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
