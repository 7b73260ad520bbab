"""OpenTelemetry traces, as a collector receives them over OTLP/HTTP."""

import gzip
import http.server
import threading

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.serving import serving

pytestmark = pytest.mark.slow

BODY = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "My password is swordfish."}],
    "principle": "Mention the harbour.",
    "alignment_ratio": 1.5,
    "max_tokens": 3,
    "temperature": 0.5,
    "n": 2,
    "ignore_eos": True,
}
REFUSED = {"logit_bias": {"99999999": 1}}  # no such token: the engine refuses the request
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector(http.server.BaseHTTPRequestHandler):
    """Appends each request's (path, body) to its server's `received`."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.received.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def spans(embedded):  # noqa: ARG001 - loads the model first, so that the server finds the converted copy
    """All spans that a server exported until it ended."""
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    collector.received = []
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with serving("--otlp-traces-endpoint", endpoint) as (url, _):
        headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        assert httpx.post(url + "/v1/chat/completions", json=BODY, headers=headers, timeout=60).status_code == 200
        streamed = BODY | {"stream": True, "n": 1}
        assert httpx.post(url + "/v1/chat/completions", json=streamed, timeout=60).text.endswith("[DONE]\n\n")
        assert httpx.post(url + "/v1/chat/completions", json=BODY | REFUSED).status_code == 400
        text = {"model": "smollm2", "prompt": "Once", "max_tokens": 2, "ignore_eos": True}
        assert httpx.post(url + "/v1/completions", json=text, timeout=60).status_code == 200
        assert httpx.post(url + "/v1/completions?api_key=swordfish", json=text, timeout=60).status_code == 200
        httpx.get(url + "/health")
    collector.shutdown()
    assert {path for path, _ in collector.received} == {"/v1/traces"}
    batches = [ExportTraceServiceRequest.FromString(body) for _, body in collector.received]
    assert not any(b"swordfish" in body or b"harbour" in body for _, body in collector.received)
    resources = [resource for batch in batches for resource in batch.resource_spans]
    names = {a.key: a.value.string_value for resource in resources for a in resource.resource.attributes}
    assert names["service.name"] == "linalign"
    return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


def value(any_value):
    kind = any_value.WhichOneof("value")
    content = getattr(any_value, kind)
    return [value(item) for item in content.values] if kind == "array_value" else content


def attributes(span):
    return {attribute.key: value(attribute.value) for attribute in span.attributes}


def test_a_request_is_a_span_of_its_callers_trace_and_has_a_generation_span(spans):
    spans_of_trace = [span for span in spans if span.trace_id.hex() == TRACE]
    generation = next(span for span in spans_of_trace if span.name == "chat smollm2")
    http_span = next(span for span in spans_of_trace if span.span_id == generation.parent_span_id)
    assert http_span.parent_span_id.hex() == "00f067aa0ba902b7"
    assert http_span.name == "POST /v1/chat/completions"
    assert attributes(http_span)["http.response.status_code"] == 200
    values = attributes(generation)
    assert values["gen_ai.operation.name"] == "chat"
    assert values["gen_ai.request.model"] == "smollm2"
    assert (values["gen_ai.request.max_tokens"], values["gen_ai.request.temperature"]) == (3, 0.5)
    assert values["gen_ai.request.choice.count"] == 2
    assert values["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert values["gen_ai.usage.output_tokens"] == 6
    assert values["gen_ai.usage.input_tokens"] > 20
    assert values["linalign.alignment.ratios"] == [1.5]
    assert values["linalign.alignment.branches"] == 2
    assert values["linalign.alignment.branch_tokens_computed"] > values["gen_ai.usage.input_tokens"]
    events = [event.name for event in generation.events]
    assert sorted(events) == ["first step", "first step", "first token", "first token"]
    assert all(generation.start_time_unix_nano <= event.time_unix_nano for event in generation.events)
    assert all(event.time_unix_nano <= generation.end_time_unix_nano for event in generation.events)


def test_streams_texts_and_refusals_have_spans_too_and_health_has_none(spans):
    generations = [span for span in spans if span.name in ("chat smollm2", "text_completion smollm2")]
    reasons = [attributes(span).get("gen_ai.response.finish_reasons") for span in generations]
    assert sorted(reasons, key=str) == sorted([None, *[["length"]] * 3, ["length", "length"]], key=str)
    (refused,) = [span for span in generations if attributes(span).get("error.type")]
    assert attributes(refused)["error.type"] == "InvalidRequest"
    assert len(spans) == 10
    assert [attributes(span)["url.query"] for span in spans if "url.query" in attributes(span)] == ["REDACTED"]
    assert not any("/health" in span.name for span in spans)


def test_without_an_endpoint_nothing_is_traced(monkeypatch):
    """Otherwise FastAPI would send bodies of invalid requests to the endpoint in the environment's variables."""
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    collector.received = []
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    with serving() as (url, _):
        assert httpx.post(url + "/v1/chat/completions", json=BODY | {"max_tokens": "x"}).status_code == 400
    collector.shutdown()
    assert collector.received == []
