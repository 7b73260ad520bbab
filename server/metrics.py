"""Prometheus metrics, under vLLM's names with our prefix."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from linalign import Output, Prompt
from linalign.alignment_core.output import FinishReason, Stats

# Upper bounds of buckets, in seconds: from the times of an idle GPU to those of a busy CPU.
SHORT_TIMES = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_GAPS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10,
)  # fmt: skip
LONG_TIMES = (0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
RATIOS = (0, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20)
NATS = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 2, 3, 5, 10, 20)


GAUGE, COUNTER = GaugeMetricFamily, CounterMetricFamily
ENGINE_METRICS: tuple[tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Callable[[Stats], float]], ...] = (
    (GAUGE, "num_requests_running", "Sequences in the running batch", lambda s: s.num_running),
    (GAUGE, "num_requests_waiting", "Sequences that wait for admission", lambda s: s.num_waiting),
    (GAUGE, "kv_cache_usage_perc", "Share of the KV cache's pages that are held, 0 to 1", lambda s: s.kv_cache_usage),
    (COUNTER, "generation_tokens", "Tokens generated, once a sequence", lambda s: s.num_tokens_generated),
    (COUNTER, "num_preemptions", "Sequences preempted", lambda s: s.num_preemptions),
    (COUNTER, "prefix_cache_queries", "Context tokens admitted, all branches", lambda s: s.num_tokens_admitted),
    (COUNTER, "prefix_cache_hits", "Context tokens that prefix reuse spared", lambda s: s.num_tokens_cached),
    (COUNTER, "spec_decode_num_draft_tokens", "Tokens drafted by prompt lookup", lambda s: s.num_tokens_drafted),
    (COUNTER, "spec_decode_num_accepted_tokens", "Drafted tokens that were drawn", lambda s: s.num_tokens_accepted),
)


class EngineCollector(Collector):
    """The counts of the engines. stats: The newest of each engine by its name; a single engine may have the name ""."""

    def __init__(self) -> None:
        self.stats: dict[str, Stats] = {}

    def collect(self) -> Iterable[Metric]:
        labels = ["replica"] if any(self.stats) else []
        for kind, name, text, count in ENGINE_METRICS:
            family = kind(f"linalign:{name}", text, labels=labels)
            for replica, stats in self.stats.items():
                family.add_metric([replica] if labels else [], count(stats))
            yield family


class Measures:
    """Updates the metrics for every request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engines = EngineCollector()
        self.registry.register(self.engines)
        ProcessCollector(registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"linalign:{name}", text, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"linalign:{name}", text, labels, registry=self.registry)

        self._first = histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token", SHORT_TIMES
        )
        self._gap = histogram("inter_token_latency_seconds", "Between one token of a choice and its next", TOKEN_GAPS)
        self._whole = histogram(
            "e2e_request_latency_seconds", "From the request's arrival to a choice's end", LONG_TIMES
        )
        self._queued = histogram("request_queue_time_seconds", "From submission to the first step", SHORT_TIMES)
        self._prefill = histogram("request_prefill_time_seconds", "From the first step to the first token", SHORT_TIMES)
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last", LONG_TIMES)
        self._prompts = counter("prompt_tokens", "Tokens of prompts, the user's view")
        self._ends = counter("request_success", "Choices that have ended, by their finish_reason", "finished_reason")
        self._aligned = counter("aligned_requests", "Choices with a principle that changes the logits")
        self._computed = counter("branch_tokens_computed", "Tokens that were computed, all branches")
        self._extra = counter("extra_tokens_computed", "Of them, those of all branches but a choice's first")
        self._ratio = histogram("request_alignment_ratio", "Ratio of aligned choices, unsigned", RATIOS)
        self._kl = histogram("alignment_kl_nats", "KL(aligned || base) of tokens with an alignment_trace", NATS)
        self.responses = counter("http_responses", "Responses, by route and status", "path", "status")
        self.rejected = counter("requests_rejected", "Requests that were not served, by their error's code", "code")
        # rate() misses the step from no series to a value above 0, so the series of alerts exist from the start.
        for reason in get_args(FinishReason):
            self._ends.labels(reason)
        self.rejected.labels("queue_full")

    def expect(self, path: str) -> None:
        """Create the series of a route's responses, server errors included, at 0."""
        for status in (200, 500, 503):
            self.responses.labels(path, status)

    def listener(self, prompt: Prompt, began: float) -> Callable[[Output], None]:
        """A listener for outputs of one request, called in the engine's thread. began: time.monotonic() at arrival."""
        newest: dict[int, float] = {}  # the time of each choice's last token
        # Remaining given tokens of each choice: their outputs are not new tokens.
        num_given: dict[int, int] = defaultdict(lambda: len(prompt.given))

        def observe(output: Output) -> None:
            now = time.monotonic()
            if num_given[output.choice] > 0:
                num_given[output.choice] -= len(output.token_ids)
            elif output.token_ids:
                if output.choice in newest:
                    self._gap.observe(now - newest[output.choice])
                else:
                    self._first.observe(now - began)
                newest[output.choice] = now
            for report in output.logprobs:
                if report.trace:
                    self._kl.observe(report.trace.kl)
            if output.finish_reason:
                self._end(prompt, output, began, now)

        return observe

    def _end(self, prompt: Prompt, output: Output, began: float, now: float) -> None:
        self._ends.labels(output.finish_reason).inc()
        self._whole.observe(now - began)
        if output.choice == 0:
            self._prompts.inc(len(prompt.principled[0]) + len(prompt.given))
        if output.usage:
            self._computed.inc(output.usage.branch_tokens_computed)
            self._extra.inc(output.usage.extra_tokens_computed)
        if prompt.base is not None:
            self._aligned.inc()
            # Unsigned, because a sum that may decrease is no counter.
            self._ratio.observe(abs(sum(w * r for w, r in zip(prompt.weights, prompt.ratios, strict=True))))
        if output.times and output.times.admitted:
            self._queued.observe(output.times.admitted - output.times.submitted)
            if output.times.first_token:
                self._prefill.observe(output.times.first_token - output.times.admitted)
                self._decode.observe(now - output.times.first_token)
