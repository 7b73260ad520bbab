"""GET /metrics, parsed as Prometheus does."""

import resource
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

HISTORY = [{"role": "user", "content": "Tell me about the power plants of our town. " * 8}]


def scrape(url):
    response = httpx.get(url + "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {full_name(sample): sample.value for family in families for sample in family.samples}


def full_name(sample):
    labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
    return sample.name + (f"{{{labels}}}" if labels else "")


def chat(url, messages, **fields):
    body = {"model": "smollm2", "messages": messages, "max_tokens": 8, "temperature": 0, "principle": "Be brief."}
    return httpx.post(url + "/v1/chat/completions", json=body | fields, timeout=60).json()


def test_a_second_turn_hits_the_first_ones_prefix_in_both_branches(own_server):
    url, _ = own_server
    assert not any(
        value for name, value in scrape(url).items() if name.startswith("linalign:") and "_created" not in name
    )
    first = chat(url, HISTORY)
    before = scrape(url)
    reply = first["choices"][0]["message"]
    second = chat(url, [*HISTORY, reply, {"role": "user", "content": "And then?"}])
    after = scrape(url)
    hits = after["linalign:prefix_cache_hits_total"] - before["linalign:prefix_cache_hits_total"]
    queries = after["linalign:prefix_cache_queries_total"] - before["linalign:prefix_cache_queries_total"]
    assert hits == second["usage"]["alignment_details"]["prefix_cached_tokens"]
    assert hits > 1.5 * first["usage"]["prompt_tokens"]  # most of the prompt in both branches
    decoded = 2 * (second["usage"]["completion_tokens"] - 1)  # the last token is drawn but never computed
    assert hits + second["usage"]["alignment_details"]["branch_tokens_computed"] == queries + decoded
    num_generated = [reply["usage"]["completion_tokens"] for reply in (first, second)]
    assert (before["linalign:generation_tokens_total"], after["linalign:generation_tokens_total"]) == (
        num_generated[0],
        sum(num_generated),
    )
    assert after["linalign:num_requests_running"] == after["linalign:kv_cache_usage_perc"] == 0


def test_series_of_alerts_exist_from_the_start(own_server):
    """Series that alerts use exist with value 0, because rate() ignores a series that begins above 0."""
    url, _ = own_server
    seen = scrape(url)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        for status in (200, 500, 503):
            assert f"linalign:http_responses_total{{path={path},status={status}}}" in seen
    for reason in ("stop", "length", "abort", "error"):
        assert f"linalign:request_success_total{{finished_reason={reason}}}" in seen
    assert "linalign:requests_rejected_total{code=queue_full}" in seen


def test_running_requests_are_in_the_metrics(own_server):
    url, _ = own_server
    body = {"model": "smollm2", "messages": HISTORY, "max_tokens": 400, "stream": True}
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # keep a reference: httpx closes the connection with its iterator
        # Not the first chunk: its content is empty, and the request may still be in the queue.
        assert any('"content":"' in line and '"content":""' not in line for line in lines)
        seen = scrape(url)
    assert seen["linalign:num_requests_running"] == 1
    assert 0 < seen["linalign:kv_cache_usage_perc"] < 1


HISTOGRAMS = [
    "time_to_first_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
]


def change(before, after):
    return lambda name: after.get(f"linalign:{name}", 0) - before.get(f"linalign:{name}", 0)


def test_times_are_measured_and_add_up(url):
    before = scrape(url)
    began = time.monotonic()
    reply = chat(url, HISTORY, n=2, max_tokens=5, ignore_eos=True)
    seconds = time.monotonic() - began
    delta = change(before, scrape(url))
    assert len(reply["choices"]) == 2
    for name in HISTOGRAMS:
        assert delta(f"{name}_count") == 2, name
        assert 0 < delta(f"{name}_sum") < 2 * seconds, name
        assert delta(f"{name}_bucket{{le=+Inf}}") == 2
    assert delta("inter_token_latency_seconds_count") == 2 * 4
    parts = sum(delta(f"request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode"))
    assert parts <= delta("e2e_request_latency_seconds_sum")
    assert delta("time_to_first_token_seconds_sum") + delta("inter_token_latency_seconds_sum") == pytest.approx(
        delta("e2e_request_latency_seconds_sum"), abs=0.01
    )
    assert delta("prompt_tokens_total") == reply["usage"]["prompt_tokens"]
    assert delta("generation_tokens_total") == reply["usage"]["completion_tokens"] == 10


def test_alignment_is_counted(url):
    before = scrape(url)
    aligned = [chat(url, HISTORY, alignment_ratio=ratio, alignment_trace=True) for ratio in (-1, 4)]
    httpx.post(url + "/v1/completions", json={"model": "smollm2", "prompt": "Once", "max_tokens": 2}, timeout=60)
    delta = change(before, scrape(url))
    assert delta("aligned_requests_total") == delta("request_alignment_ratio_count") == 2
    assert delta("request_alignment_ratio_sum") == 5
    traces = [token["kl"] for reply in aligned for token in reply["choices"][0]["alignment"]]
    assert delta("alignment_kl_nats_count") == len(traces) > 0
    assert delta("alignment_kl_nats_sum") == pytest.approx(sum(traces))
    computed = sum(reply["usage"]["alignment_details"]["branch_tokens_computed"] for reply in aligned)
    assert delta("branch_tokens_computed_total") > computed > 0


def test_tokens_of_further_branches_are_counted_separately(own_server):
    url, _ = own_server
    plain = chat(url, HISTORY, principle=None)["usage"]["alignment_details"]["branch_tokens_computed"]
    assert scrape(url)["linalign:extra_tokens_computed_total"] == 0
    before = scrape(url)
    aligned = chat(url, [{"role": "user", "content": "Elsewhere, " + HISTORY[0]["content"]}])["usage"]
    delta = change(before, scrape(url))
    extra = delta("extra_tokens_computed_total")
    assert plain > 0
    assert aligned["completion_tokens"] <= extra < delta("branch_tokens_computed_total")
    assert delta("branch_tokens_computed_total") == aligned["alignment_details"]["branch_tokens_computed"]


def test_ends_and_refusals_are_counted_by_reason(url):
    before = scrape(url)
    chat(url, HISTORY, max_tokens=1)
    chat(url, HISTORY, max_tokens=40, stop=["e"])
    chat(url, HISTORY * 200)
    chat(url, HISTORY, temprature=1)
    abandoned = {"model": "smollm2", "messages": HISTORY, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", url + "/v1/chat/completions", json=abandoned) as response:
        next(response.iter_lines())
    httpx.get(url + "/a-stranger's/" + "x" * 50)
    deadline = time.monotonic() + 30
    while change(before, scrape(url))("request_success_total{finished_reason=abort}") < 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    delta = change(before, scrape(url))
    assert delta("request_success_total{finished_reason=length}") == 1
    assert delta("request_success_total{finished_reason=stop}") == 1
    assert delta("request_success_total{finished_reason=abort}") == 1
    assert delta("requests_rejected_total{code=context_length_exceeded}") == 1
    assert delta("requests_rejected_total{code=unknown_field}") == 1
    assert delta("http_responses_total{path=/v1/chat/completions,status=400}") == 2
    assert delta("http_responses_total{path=other,status=404}") == 1  # all unknown paths share one series


def test_given_tokens_are_not_measured_as_new_tokens(url):
    before = scrape(url)
    text = {
        "model": "smollm2",
        "prompt": "The towns of our coast are old",
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
    }
    assert httpx.post(url + "/v1/completions", json=text, timeout=60).status_code == 200
    delta = change(before, scrape(url))
    assert delta("time_to_first_token_seconds_count") == 1
    assert delta("inter_token_latency_seconds_count") == 0


def test_waiting_counts_only_live_sequences(own_server):
    _, engine = own_server
    engine.stop()
    for id in range(8):
        engine.abort(id)
    assert engine.stats().num_waiting == 0


def test_the_process_is_measured_too(url):
    assert scrape(url)["process_open_fds"] > 3
    assert scrape(url)["process_resident_memory_bytes"] > 1e8
    assert scrape(url)["process_max_fds"] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # raised to the hard limit
