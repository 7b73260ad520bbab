"""Two replicas on a real Ray cluster: their replies, and what is lost when a replica is lost."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
import types

import httpx
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from linalign.ray import remote_engine
from linalign.ray.application import SHUTDOWN_TIMEOUT, EngineReplica, build
from linalign.ray.remote_engine import Description, RemoteEngine
from linalign.server.shutdown import LONGEST_STEP_FACTOR, STEP_TIMEOUT
from tests.deploy.faulty import DIES
from tests.deploy.ray_cluster import (
    LOGS,
    PAIR,
    PRINCIPLE,
    ROOT,
    SEQS,
    Stream,
    chat,
    cluster_of,
    expect_replacement,
    fill,
    held,
    metric,
    pid_of,
    replicas,
    sdk,
    wait,
)

pytestmark = pytest.mark.alone  # starts seven processes at once, and depends on Ray's timeouts
NUM_TOKENS = 80  # of streams that fill held engines; takes about 45 seconds
LONG = 2000  # tokens of replies that are cancelled


@pytest.fixture(scope="module")
def cluster(embedded, tmp_path_factory):  # noqa: ARG001 - loads the model first, so that the replicas find its copy
    """The URL of a cluster with two replicas, and the folder in which files trigger faults."""
    folder = tmp_path_factory.mktemp("cluster")
    with cluster_of([PAIR], folder) as url:
        yield url, folder


def test_replies_equal_those_of_one_server(cluster, url):
    pair = cluster[0] + "/pair"
    questions = ["How do I get to work?", "What is rain?"]
    for fields in (
        {"max_tokens": 24},
        {"max_tokens": 16, "temperature": 1, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2},
        {"max_tokens": 40, "response_format": {"type": "json_object"}, "alignment_trace": True},
    ):
        for question in questions:
            here, there = chat(url, question, **fields), chat(pair, question, **fields)
            assert here.status_code == there.status_code == 200
            assert there.json()["choices"] == here.json()["choices"]
            assert there.json()["usage"]["completion_tokens"] == here.json()["usage"]["completion_tokens"]


def test_the_sdk_streams(cluster, client):
    def pieces(client):
        stream = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "How do I get to work?"}],
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=PRINCIPLE,
        )
        *chunks, last = list(stream)
        return [chunk.choices[0].delta.content for chunk in chunks], last.usage.completion_tokens

    texts, num_tokens = pieces(sdk(cluster[0] + "/pair"))
    assert (texts, num_tokens) == pieces(client)
    assert len(texts) > 10  # they arrived in pieces, not all at the end


def test_the_log_has_a_line_for_every_request(cluster):
    chat(cluster[0] + "/pair", max_tokens=3)

    def lines():
        return [line for log in LOGS.glob("worker-*.err") for line in log.read_text().splitlines()]

    wait(lambda: any("path=/pair/v1/chat" in line and "completion_tokens=3" in line for line in lines()))


def test_bad_input_is_refused_as_by_one_server(cluster, url):
    pair = cluster[0] + "/pair"
    for fields in (
        {"temprature": 1},
        {"n": 100},
        {"model": "other"},
        {"presence_penalty": 9},
        {"logit_bias": {"99999999": 1}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
    ):
        here, there = chat(url, **fields), chat(pair, **fields)
        assert (there.status_code, there.json()["error"]["code"]) == (here.status_code, here.json()["error"]["code"])
        assert 400 <= there.status_code < 500
        assert there.json()["error"]["param"] == here.json()["error"]["param"]
        assert "Traceback" not in there.text


def test_a_disconnect_aborts_the_request_on_the_replica(cluster):
    url = cluster[0] + "/pair"
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about towns."}], **PRINCIPLE}
    body |= {"max_tokens": LONG, "ignore_eos": True, "n": 2}

    def num_running():
        return sum(metric(url, "num_requests_running").values())

    with httpx.stream("POST", url + "/v1/chat/completions", json={**body, "stream": True}, timeout=60) as response:
        pieces = response.iter_text()  # keep a reference: httpx closes the connection with its iterator
        next(pieces)
        wait(lambda: num_running() == 2, seconds=30)
    wait(lambda: num_running() == 0, seconds=30)

    with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as connection:
        content = json.dumps(body).encode()
        head = "POST /pair/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait(lambda: num_running() == 2, seconds=30)
    wait(lambda: num_running() == 0, seconds=30)


def test_requests_beyond_replicas_and_queue_are_503(cluster):
    url, folder = cluster[0] + "/pair", cluster[1]
    with held(folder):
        running, waiting, refused = fill(url, "towns", NUM_TOKENS)
        assert (refused.status_code, refused.body["code"]) == (503, "overloaded")
        assert int(refused.response.headers["retry-after"]) >= 1
        before = questions(replicas(url))
        for _ in range(12):  # health uses known stats: a stats call would wait for a slot of the full engines
            assert httpx.get(url + "/health", timeout=30).status_code == 200
    for stream in running + waiting:
        stream.join()
        assert stream.error is None
        assert stream.num_tokens == NUM_TOKENS
    # Now the pending stats calls are answered and logged: only those of `replicas` itself, at most twice two.
    assert questions(replicas(url)) <= before + 2 * 2
    assert chat(url, max_tokens=1).status_code == 200


def questions(replicas):
    """Number of stats calls that the replicas have received. Ray logs one line for each."""
    logs = [log for replica in replicas for log in LOGS.glob(f"serve/replica_*EngineReplica_{replica}.log")]
    assert len(logs) == len(replicas)
    return sum(log.read_text().count("CALL stats ") for log in logs)


def test_a_failed_engine_is_replaced_and_its_unstarted_requests_move(cluster):
    expect_replacement(cluster, DIES)


def test_a_killed_replica_loses_only_started_requests(cluster):
    url, folder = cluster[0] + "/pair", cluster[1]
    before = replicas(url)
    with held(folder):
        running, waiting, _ = fill(url, "lakes", NUM_TOKENS)
        wait(lambda: metric(url, "num_requests_running") == dict.fromkeys(before, SEQS), seconds=20)
        victim = min(before)
        os.kill(pid_of(victim), signal.SIGKILL)
    for stream in running + waiting:
        stream.join()
    assert sum(stream.error is not None for stream in running) == SEQS
    assert not any(stream.error for stream in waiting)
    lost = [stream for stream in running if stream.error is not None]
    for stream, again in [(stream, Stream(url, stream.question, NUM_TOKENS)) for stream in lost]:  # clients retry
        assert stream.error.body["code"] == "engine_dead"  # as an event of the stream
        again.join()
        assert (again.error, again.num_tokens) == (None, NUM_TOKENS)
        assert again.text.startswith(stream.text)
    wait(lambda: len(replicas(url)) == 2 and victim not in replicas(url))


def test_health_is_503_if_no_replica_is_healthy(cluster):
    url = cluster[0] + "/pair"
    wait(lambda: len(replicas(url)) == 2)
    for replica in replicas(url):
        os.kill(pid_of(replica), signal.SIGKILL)
    answer = wait(lambda: (response := httpx.get(url + "/health", timeout=30)).status_code != 200 and response)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert "linalign:http_responses_total" in httpx.get(url + "/metrics", timeout=30).raise_for_status().text


# Tests without a cluster


def test_a_replica_with_a_hanging_step_is_unhealthy():
    reported = []
    replica = object.__new__(EngineReplica)
    replica._engine = types.SimpleNamespace(give_up=reported.append, ensure_accepting=lambda: None, stop=lambda: None)
    for ago, is_well in ((STEP_TIMEOUT / 2, True), (STEP_TIMEOUT + 1, False)):
        replica._engine.pace = (time.monotonic() - ago, STEP_TIMEOUT / LONGEST_STEP_FACTOR)
        replica.check_health()
        assert bool(reported) != is_well


def test_replicas_with_recent_stats_are_not_asked(tokenizer, monkeypatch):
    """A stats call to a full replica would wait for a slot."""
    calls = []

    async def answer(return_exceptions):
        return [("replica", "stats")] if return_exceptions else []

    def broadcast(name):
        calls.append(name)
        return types.SimpleNamespace(results_async=answer)

    engine = RemoteEngine(types.SimpleNamespace(broadcast=broadcast), Description("x", tokenizer, 300, 100, 100, 16))

    async def look(times):
        for _ in range(times):
            await engine.check_health()

    asyncio.run(look(12))
    assert calls == ["stats"]
    monkeypatch.setattr(remote_engine, "HEALTHY_FOR", 0)
    asyncio.run(look(2))
    assert calls == ["stats"] * 3


def test_an_engine_has_its_processes_on_one_machine_and_no_queue_of_its_own():
    settings = {"device": "cpu", "tensor_parallel_size": 3, "max_num_seqs": 4, "max_queued_requests": 1}
    ingress = build(settings)._bound_deployment
    engines = ingress.init_args[0]._bound_deployment
    assert engines._replica_config.placement_group_bundles == [{"CPU": 3}]
    assert engines._replica_config.placement_group_strategy == "STRICT_PACK"
    assert (engines.max_ongoing_requests, engines.max_queued_requests) == (4, 1)
    assert engines.init_args[0].max_queued_requests == sys.maxsize  # Ray queues requests, not the engine
    assert ingress._deployment_config.graceful_shutdown_timeout_s > SHUTDOWN_TIMEOUT  # Ray's default is only 20 s


@pytest.mark.parametrize("file", sorted((ROOT / "deploy/ray").glob("*.yaml")), ids=lambda file: file.name)
def test_the_configurations_are_valid(file):
    for one in ServeDeploySchema.model_validate(yaml.safe_load(file.read_text())).applications:
        built = build(one.args)
        known = {"Ingress", "EngineReplica"}
        assert {deployment.name for deployment in one.deployments} <= known
        assert one.import_path == "linalign.ray.application:build"
        assert built


def test_settings_without_effect_on_ray_are_refused():
    with pytest.raises(ValueError, match=r"port has no effect here: see http_options\.port"):
        build({"port": 8000})
    with pytest.raises(ValueError, match="modle"):
        build({"modle": "x"})


def test_errors_of_settings_hide_their_values():
    with pytest.raises(ValueError, match="api_keys") as error:
        build({"api_keys": [1, "sekret"]})
    assert "sekret" not in str(error.value)


def test_variables_that_are_not_settings_are_refused(monkeypatch):
    monkeypatch.setenv("LINALIGN_MAXNUMSEQS", "4")
    with pytest.raises(ValueError, match="LINALIGN_MAXNUMSEQS; did you mean LINALIGN_MAX_NUM_SEQS"):
        build({})
