"""GET /metrics, as Prometheus reads it."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

HISTORY = [{"role": "user", "content": "Tell me about the power plants of our town. " * 8}]


def scrape(url):
    response = httpx.get(url + "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def chat(url, messages, **fields):
    body = {"model": "smollm2", "messages": messages, "max_tokens": 8, "temperature": 0, "principle": "Be brief."}
    return httpx.post(url + "/v1/chat/completions", json=body | fields, timeout=60).json()


def test_a_second_turn_hits_the_first_ones_prefix_in_both_branches(own_server):
    url, _ = own_server
    assert not any(scrape(url).values())
    first = chat(url, HISTORY)
    before = scrape(url)
    reply = first["choices"][0]["message"]
    second = chat(url, [*HISTORY, reply, {"role": "user", "content": "And then?"}])
    after = scrape(url)
    hits = after["linalign:prefix_cache_hits_total"] - before["linalign:prefix_cache_hits_total"]
    queries = after["linalign:prefix_cache_queries_total"] - before["linalign:prefix_cache_queries_total"]
    assert hits == second["usage"]["alignment_details"]["prefix_cached_tokens"]
    assert hits > 1.5 * first["usage"]["prompt_tokens"]  # most of both branches
    decoded = 2 * (second["usage"]["completion_tokens"] - 1)  # the last token is never computed
    assert hits + second["usage"]["alignment_details"]["branch_tokens_computed"] == queries + decoded
    drawn = [reply["usage"]["completion_tokens"] for reply in (first, second)]
    assert (before["linalign:generation_tokens_total"], after["linalign:generation_tokens_total"]) == (
        drawn[0],
        sum(drawn),
    )
    assert after["linalign:num_requests_running"] == after["linalign:kv_cache_usage_perc"] == 0


def test_running_requests_show_while_they_run(own_server):
    url, _ = own_server
    body = {"model": "smollm2", "messages": HISTORY, "max_tokens": 400, "stream": True}
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=60) as response:
        assert any('"content"' in line for line in response.iter_lines())
        seen = scrape(url)
    assert seen["linalign:num_requests_running"] == 1
    assert 0 < seen["linalign:kv_cache_usage_perc"] < 1
