"""More tests on a real Ray cluster, in the long run only: routing, scaling, tensor parallelism, redeployment, hangs."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.deploy.faulty import HANGS, STALLS
from tests.deploy.ray_cluster import (
    PAIR,
    ROOT,
    SEQS,
    Stream,
    application,
    chat,
    cluster_of,
    expect_replacement,
    metric,
    pid_of,
    replicas,
    wait,
)

pytestmark = [pytest.mark.alone, pytest.mark.long]  # starts fourteen processes at once, and depends on Ray's timeouts
RAYS_GRACE = 20  # seconds, Ray's default grace period of a deployment
TOWNS = ["Bergen", "Cork", "Delft", "Evora", "Fano"]  # an odd number, so that round-robin alternates each one's replica
APPLICATIONS = [
    PAIR,
    application(
        "in-turn",
        num_replicas=2,
        request_router_config={"request_router_class": "tests.deploy.faulty.RoundRobin"},
    ),
    application(
        "elastic",
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 2,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 1,
            "upscale_delay_s": 0,
            "downscale_delay_s": 2,
        },
    ),
    application("parallel", args={"tensor_parallel_size": 3, "max_num_seqs": SEQS, "max_queued_requests": 1}),
]


@pytest.fixture(scope="module")
def cluster(embedded, tmp_path_factory):  # noqa: ARG001 - loads the model first, so that the replicas find its copy
    """The URL of a cluster with APPLICATIONS, and the folder in which files trigger faults."""
    folder = tmp_path_factory.mktemp("cluster")
    with cluster_of(APPLICATIONS, folder) as url:
        yield url, folder


def test_conversations_stay_on_the_replica_with_their_pages(cluster):
    """Five conversations of four turns: the share of prompt tokens from the cache, routed by prefix and in turn."""

    def share_cached(url):
        before = [metric(url, name) for name in ("prefix_cache_hits_total", "prefix_cache_queries_total")]
        histories = [[{"role": "user", "content": f"Tell me about {town}. " * 12}] for town in TOWNS]
        for _ in range(4):
            for history in histories:
                reply = chat(url, messages=history, max_tokens=16).json()["choices"][0]["message"]["content"]
                history += [{"role": "assistant", "content": reply}, {"role": "user", "content": "And then?"}]
        after = [metric(url, name) for name in ("prefix_cache_hits_total", "prefix_cache_queries_total")]
        worked = [replica for replica in after[1] if after[1][replica] > before[1][replica]]
        hits, queries = (sum(a.values()) - sum(b.values()) for a, b in zip(after, before, strict=True))
        return hits / queries, len(worked)

    by_prefix, num_by_prefix = share_cached(cluster[0] + "/pair")
    in_turn, num_in_turn = share_cached(cluster[0] + "/in-turn")
    assert num_by_prefix == num_in_turn == 2  # both replicas had work
    assert by_prefix > in_turn + 0.2
    print(f"cached: {by_prefix:.0%} by prefix, {in_turn:.0%} in turn")


def test_waiting_choices_of_an_engine_are_not_a_queue(cluster):
    """Ray queues requests in front of the engines. One slot serves all choices of a request."""
    url = cluster[0] + "/parallel"
    streams = []
    for num_waiting in (0, 0, 2, 4):  # waiting choices after each new stream; two streams fill the engine
        streams.append(Stream(url, f"Tell me about {len(streams)} moors.", 50, n=2))
        assert num_waiting or streams[-1].begun.wait(60)
        wait(lambda number=num_waiting: sum(metric(url, "num_requests_waiting").values()) == number)
    for stream in streams:
        stream.join()
        assert (stream.error, stream.num_tokens) == (None, 100)


def test_unstarted_requests_of_a_lost_replica_wait_for_another(cluster):
    url, trigger = cluster[0] + "/pair", cluster[1] / str(STALLS)
    wait(lambda: len(replicas(url)) == 2)
    trigger.touch()
    streams = [Stream(url, "Tell me about seas.", 300, seed=STALLS)]  # its engine makes no progress from now on
    (victim,) = wait(lambda: [name for name, number in metric(url, "num_requests_running").items() if number])
    assert not trigger.exists()
    while not (one := Stream(url, f"Tell me about {len(streams)} seas.", 300)).begun.wait(1) or one.error is None:
        streams.append(one)  # one after the other, as in `fill`
    assert one.error.body["code"] == "overloaded"
    assert len(streams) == 3 * SEQS  # all slots are taken, and the queue is full
    assert sum(stream.begun.is_set() for stream in streams) <= SEQS
    os.kill(pid_of(victim), signal.SIGKILL)
    for stream in streams:
        stream.join()
        assert (stream.error, stream.num_tokens) == (None, 300)
    wait(lambda: len(replicas(url)) == 2)


def test_a_hanging_engine_is_replaced_and_its_unstarted_requests_move(cluster):
    expect_replacement(cluster, HANGS)


def test_replicas_come_and_go_with_the_load(cluster):
    url = cluster[0] + "/elastic"
    wait(lambda: len(replicas(url)) == 1)
    streams = [Stream(url, f"Tell me about {number} towns.", 300) for number in range(8)]
    wait(lambda: len(replicas(url)) == 2)
    more = [Stream(url, f"Tell me about {number} hills.", 50) for number in range(8)]
    wait(lambda: all(metric(url, "num_requests_running").values()))  # the second replica has work
    for stream in streams + more:
        stream.join()
        assert stream.error is None  # also on the replica that is removed
    wait(lambda: len(replicas(url)) == 1)
    assert chat(url, max_tokens=1).status_code == 200


def test_the_processes_of_an_engine_are_one_placement_group(cluster, url):
    reply = chat(cluster[0] + "/parallel", max_tokens=16)
    assert reply.json()["choices"] == chat(url, max_tokens=16).json()["choices"]
    code = (
        "import json, ray; from ray.util import placement_group_table; ray.init('auto', log_to_driver=False); "
        "print(json.dumps([g for g in placement_group_table().values() if g['state'] == 'CREATED']))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    (group,) = json.loads(output.splitlines()[-1])
    assert group["strategy"] == "STRICT_PACK"
    assert list(group["bundles"].values()) == [{"CPU": 3.0}]


def test_health_is_503_if_no_replica_is_healthy(cluster):
    url = cluster[0] + "/parallel"
    assert httpx.get(url + "/health", timeout=30).status_code == 200
    (only,) = replicas(url)
    os.kill(pid_of(only), signal.SIGKILL)
    errors = set()

    def is_well_again():
        answer = httpx.get(url + "/health", timeout=30)
        if answer.status_code == 200:
            return errors
        errors.add((answer.status_code, answer.json()["error"]["code"]))
        assert "linalign:http_responses_total" in httpx.get(url + "/metrics", timeout=30).raise_for_status().text
        return False

    wait(is_well_again)  # Ray has restarted all three processes
    assert errors == {(503, "engine_dead")}
    assert chat(url, max_tokens=4).status_code == 200


def test_replies_survive_a_redeployment(cluster):
    """The old ingress continues for longer than Ray's default grace period."""
    url = cluster[0] + "/parallel"
    args = {**APPLICATIONS[-1]["args"], "max_model_len": 1000}
    redeploy = (
        "import ray; from ray import serve; from tests.deploy.faulty import build; "
        "ray.init('auto', namespace='serve', log_to_driver=False); "
        f"serve.run(build({{'device': 'cpu', **{args}}}), name='parallel', route_prefix='/parallel')"
    )
    body = {"model": "smollm2", "prompt": "The sea", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=120) as response:
        pieces = response.iter_text()
        next(pieces)
        before = replicas(url)
        # This process ends when the old ingress has ended.
        deploying = subprocess.Popen([sys.executable, "-c", redeploy], env=environment, cwd=cluster[1])
        wait(lambda: (now := replicas(url)) and not now & before, deploying)
        until = time.monotonic() + RAYS_GRACE + 5
        while time.monotonic() < until:
            assert "data: {" in (piece := next(pieces)) or piece.startswith(": ping")
    assert deploying.wait(120) == 0
    assert chat(url, max_tokens=4).status_code == 200
    assert chat(url, max_tokens=1000).status_code == 400  # exceeds the new deployment's context
