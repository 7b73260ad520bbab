"""OpenTelemetry traces: FastAPI's span of each HTTP request, and in it a span of the request to the engine, with the
gen_ai attributes of the semantic conventions. Spans hold no prompts and no replies.
"""

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace

from linalign import Output, Prompt, SamplingParams

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

QUIET = ("/health", "/metrics")
# All switches are set: environment variables could otherwise enable the recording of invalid bodies.
OFF: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


class Tracing:
    """endpoint: an OTLP/HTTP collector's, which gets spans in the background; None for no traces.

    tracer: for spans of our own. telemetry: FastAPI's settings. Raises ModuleNotFoundError without linalign[otel].
    """

    def __init__(self, endpoint: str | None) -> None:
        self.tracer: trace.Tracer = trace.NoOpTracer()
        self.telemetry = OFF
        self.close: Callable[[], None] = lambda: None
        if endpoint:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            resource = Resource.create({SERVICE_NAME: "linalign", SERVICE_VERSION: version("linalign")})
            provider = TracerProvider(resource=resource)
            provider.add_span_processor(_without_queries())
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=3)))
            self.tracer = provider.get_tracer("linalign")
            on: TelemetryConfig = {"tracing": True, "tracer_provider": provider, "operation_spans": False}
            self.telemetry = {**OFF, **on, "exclude": lambda scope: scope.get("path") in QUIET}
            self.close = provider.shutdown  # sends the remaining spans


def _without_queries() -> "SpanProcessor":
    """A processor that removes queries from spans, because a query may contain a key."""
    from opentelemetry.sdk.trace import Span, SpanProcessor

    class WithoutQueries(SpanProcessor):
        def on_start(self, span: Span, parent_context: object = None) -> None:
            del parent_context
            if span.attributes and "url.query" in span.attributes:
                span.set_attribute("url.query", "REDACTED")

    return WithoutQueries()


class Generation:
    """The span of one request to the engine, for n choices. operation: "chat" or "text_completion". model: as the
    client calls it.
    """

    def __init__(
        self, tracer: trace.Tracer, operation: str, model: str, prompt: Prompt, params: SamplingParams, n: int
    ) -> None:
        self._left, self._reasons = n, list[str]()
        self._num_tokens = self._num_computed = 0
        all_attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "linalign",
            "gen_ai.request.model": model,
            "gen_ai.request.choice.count": n,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k or None,
            "gen_ai.request.seed": params.seed,
            "linalign.alignment.method": prompt.method,
            "linalign.alignment.ratios": prompt.ratios,
            "linalign.alignment.branches": len(prompt.branches),
        }
        given = {name: value for name, value in all_attributes.items() if value is not None}
        self._span = tracer.start_span(f"{operation} {model}", attributes=given)

    def take(self, output: Output) -> None:
        """Record an output. The span ends with the last choice."""
        usage, times = output.usage, output.times
        if not (output.finish_reason and usage and times):
            return
        self._left -= 1
        self._reasons.append(output.finish_reason)
        self._num_tokens += usage.completion_tokens
        self._num_computed += usage.branch_tokens_computed
        for name, when in (("first step", times.admitted), ("first token", times.first_token)):
            if when:
                self._span.add_event(name, {"choice": output.choice}, _since_1970(when))
        if not self._left:
            attributes: dict[str, Any] = {
                "gen_ai.response.finish_reasons": self._reasons,
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.prompt_cached_tokens,
                "gen_ai.usage.output_tokens": self._num_tokens,
                "linalign.alignment.branch_tokens_computed": self._num_computed,
            }
            self._span.set_attributes(attributes)
            self._end("error" if "error" in self._reasons else None)

    def fail(self, error: BaseException) -> None:
        """End the span: the engine has refused the request."""
        self._end(type(error).__name__)

    def _end(self, error: str | None) -> None:
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()


def _since_1970(when: float) -> int:
    """Nanoseconds. when: seconds of time.monotonic()."""
    return time.time_ns() - int((time.monotonic() - when) * 1e9)
