"""A real Ray cluster on this machine: HTTP through Ray's proxy, engines in processes of their own."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.ray.application import build
from tests.deploy.faulty import DIES, HANGS, STALLS
from tests.serving import free_port

pytestmark = pytest.mark.alone  # fourteen processes that start at once, and clocks of Ray's own
ROOT = Path(__file__).parents[2]
SEQS = 4  # at once on each replica, and as many may wait in front
LONG = 2000  # tokens that nobody waits for
RAYS_GRACE = 20  # seconds, of a deployment that doesn't say
LOGS = Path("/tmp/ray/session_latest/logs")
TOWNS = ["Bergen", "Cork", "Delft", "Evora", "Fano"]  # an odd number: in turn, each has another replica every time
PRINCIPLE = {"principle": "Mention the sea.", "alignment_ratio": 2}


def application(name, import_path="tests.deploy.faulty:build", args=None, **engine):
    return {
        "name": name,
        "route_prefix": "/" + name,
        "import_path": import_path,
        "args": {"device": "cpu", **(args or {})},
        "deployments": [{"name": "EngineReplica", **engine}],
    }


APPLICATIONS = [
    application("pair", args={"max_num_seqs": SEQS, "max_queued_requests": SEQS}, num_replicas=2),
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
def cluster(embedded, tmp_path_factory):  # noqa: ARG001 - loaded first, so that the replicas find the converted copy
    """The URL of a cluster with APPLICATIONS, and the folder that faults are triggered in."""
    port, folder = free_port(), tmp_path_factory.mktemp("cluster")
    config = folder / "config.yaml"
    http = {"host": "127.0.0.1", "port": port}
    config.write_text(yaml.safe_dump({"http_options": http, "applications": APPLICATIONS}))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "FAULTS": str(folder),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # More CPUs than there are, so that all replicas find some.
    started = "import ray; ray.init(num_cpus=16, namespace='serve', log_to_driver=False); "
    started += "from ray.serve.scripts import cli; cli()"
    command = [sys.executable, "-c", started, "run", str(config)]
    with subprocess.Popen(command, env=environment, cwd=folder) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for one in APPLICATIONS:
                wait(lambda name=one["name"]: replicas(f"{url}/{name}"), process, seconds=900)
            yield url, folder
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


def wait(condition, process=None, seconds=300):
    """Until it is true of what is known by then; what it is then."""
    deadline = time.monotonic() + seconds
    while True:
        assert process is None or process.poll() is None, "the cluster has ended"
        assert time.monotonic() < deadline, "it never came"
        with contextlib.suppress(httpx.TransportError):
            if result := condition():
                return result
        time.sleep(0.1)


def metric(url, name):
    """By replica."""
    text = httpx.get(url + "/metrics", timeout=60).text
    return {
        replica: float(value)
        for replica, value in re.findall(rf'^linalign:{name}{{replica="(\w+)"}} (\S+)$', text, re.MULTILINE)
    }


def replicas(url):
    return set(metric(url, "num_requests_running"))


def chat(url, text="Tell me about towns.", messages=None, timeout=300, **fields):
    body = {"model": "smollm2", "messages": messages or [{"role": "user", "content": text}], "temperature": 0}
    return httpx.post(f"{url}/v1/chat/completions", json={**body, **PRINCIPLE, **fields}, timeout=timeout)


def sdk(url):
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300)


class Stream(threading.Thread):
    """A reply that is being read. text, num_tokens: so far. error: what ended it, if anything but its own end."""

    def __init__(self, url, question, max_tokens, **fields):
        super().__init__(daemon=True)
        self.question, self.text, self.num_tokens, self.error = question, "", 0, None
        self.begun = threading.Event()
        self._url, self._max_tokens, self._fields = url, max_tokens, fields
        self.start()

    def run(self):
        try:
            for chunk in sdk(self._url).chat.completions.create(
                model="smollm2",
                messages=[{"role": "user", "content": self.question}],
                temperature=0,
                max_tokens=self._max_tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={**PRINCIPLE, "ignore_eos": True, **self._fields},
            ):
                if chunk.choices and chunk.choices[0].delta.content:
                    self.text += chunk.choices[0].delta.content
                    self.begun.set()
                if chunk.usage:
                    self.num_tokens = chunk.usage.completion_tokens
        except openai.APIError as error:
            self.error = error
            self.begun.set()


def pid_of(replica):
    """Of the process that writes the replica's log."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(f"EngineReplica_{replica}" in os.readlink(file) for file in (folder / "fd").iterdir()):
                name = (folder / "cmdline").read_bytes()
                if name.startswith(b"ray::ServeReplica"):
                    return int(folder.name)
    raise AssertionError(f"no process has the log of {replica}")


def test_replies_are_those_of_one_server(cluster, url):
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
    assert len(texts) > 10  # it came in pieces, not at the end


def test_the_log_has_a_line_for_every_request(cluster):
    chat(cluster[0] + "/pair", max_tokens=3)

    def lines():
        return [line for log in LOGS.glob("worker-*.err") for line in log.read_text().splitlines()]

    wait(lambda: any("path=/pair/v1/chat" in line and "completion_tokens=3" in line for line in lines()))


def test_bad_input_is_refused_as_by_one_server(cluster, url):
    pair = cluster[0] + "/pair"
    for fields in (
        {"tempratur": 1},
        {"n": 100},
        {"model": "other"},
        {"max_tokens": 10**6},
        {"logit_bias": {"99999999": 1}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
    ):
        here, there = chat(url, **fields), chat(pair, **fields)
        assert (there.status_code, there.json()["error"]["code"]) == (here.status_code, here.json()["error"]["code"])
        assert 400 <= there.status_code < 500
        assert there.json()["error"]["param"] == here.json()["error"]["param"]
        assert "Traceback" not in there.text


def test_conversations_stay_where_their_pages_are(cluster):
    """Five conversations of four turns: how much of the prompts the caches spare, by prefix and in turn."""

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
    assert num_by_prefix == num_in_turn == 2  # both had something to do
    assert by_prefix > in_turn + 0.2
    print(f"cached: {by_prefix:.0%} by prefix, {in_turn:.0%} in turn")


def test_a_client_that_leaves_takes_its_work_with_it(cluster):
    url = cluster[0] + "/pair"
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me about towns."}], **PRINCIPLE}
    body |= {"max_tokens": LONG, "ignore_eos": True, "n": 2}

    def num_running():
        return sum(metric(url, "num_requests_running").values())

    with httpx.stream("POST", url + "/v1/chat/completions", json={**body, "stream": True}, timeout=60) as response:
        next(response.iter_text())
        assert num_running() == 2
    wait(lambda: num_running() == 0, seconds=30)

    with socket.create_connection(("127.0.0.1", httpx.URL(url).port)) as connection:
        content = json.dumps(body).encode()
        head = "POST /pair/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait(lambda: num_running() == 2, seconds=30)
    wait(lambda: num_running() == 0, seconds=30)


def fill(url, about, num_tokens):
    """Streams that keep all seats of two replicas, others that wait in front of them, and what one more has got."""
    running, waiting = [], []
    for number in range(2 * SEQS):  # one by one: those that Ray looks for a seat for wait, too
        running.append(Stream(url, f"Tell me about {number} {about}.", num_tokens))
        assert running[-1].begun.wait(60)
    while not (one := Stream(url, f"Tell me about {len(waiting)} other {about}.", num_tokens)).begun.wait(1):
        waiting.append(one)
        assert len(waiting) <= SEQS
    assert not any(stream.error for stream in running + waiting)
    return running, waiting, one.error


def test_what_neither_replicas_nor_queue_can_hold_is_a_503(cluster):
    url = cluster[0] + "/pair"
    running, waiting, refused = fill(url, "towns", 400)
    assert (refused.status_code, refused.body["code"]) == (503, "overloaded")
    assert int(refused.response.headers["retry-after"]) >= 1
    before = questions(replicas(url))
    for _ in range(12):  # full engines are heard of without a question, which would wait for a seat of theirs
        assert httpx.get(url + "/health", timeout=30).status_code == 200
    for stream in running + waiting:
        stream.join()
        assert stream.error is None
        assert stream.num_tokens == 400
    # Now that there are seats, all are answered, and so logged: those of `replicas` itself, twice two at most.
    assert questions(replicas(url)) <= before + 2 * 2
    assert chat(url, max_tokens=1).status_code == 200


def test_choices_that_wait_in_an_engine_are_no_queue(cluster):
    """Ray counts requests, in front of the engines; a request has a seat for all its choices."""
    url = cluster[0] + "/parallel"
    streams = []
    for num_waiting in (0, 0, 2, 4):  # choices, once one more stream is there: two streams fill the engine
        streams.append(Stream(url, f"Tell me about {len(streams)} moors.", 50, n=2))
        assert num_waiting or streams[-1].begun.wait(60)
        wait(lambda number=num_waiting: sum(metric(url, "num_requests_waiting").values()) == number)
    for stream in streams:
        stream.join()
        assert (stream.error, stream.num_tokens) == (None, 100)


def questions(replicas):
    """How often they were asked how they are, of which Ray writes a line each."""
    logs = [log for replica in replicas for log in LOGS.glob(f"serve/replica_*EngineReplica_{replica}.log")]
    assert len(logs) == len(replicas)
    return sum(log.read_text().count("CALL stats ") for log in logs)


def test_what_a_lost_replica_had_taken_in_but_not_begun_waits_for_a_seat_elsewhere(cluster):
    url, trigger = cluster[0] + "/pair", cluster[1] / str(STALLS)
    wait(lambda: len(replicas(url)) == 2)
    trigger.touch()
    streams = [Stream(url, "Tell me about seas.", 300, seed=STALLS)]  # its engine does nothing from now on
    (victim,) = wait(lambda: [name for name, number in metric(url, "num_requests_running").items() if number])
    assert not trigger.exists()
    while not (one := Stream(url, f"Tell me about {len(streams)} seas.", 300)).begun.wait(1) or one.error is None:
        streams.append(one)  # one by one, as in `fill`
    assert one.error.body["code"] == "overloaded"
    assert len(streams) == 3 * SEQS  # all seats are taken, and the queue is full
    assert sum(stream.begun.is_set() for stream in streams) <= SEQS
    os.kill(pid_of(victim), signal.SIGKILL)
    for stream in streams:
        stream.join()
        assert (stream.error, stream.num_tokens) == (None, 300)
    wait(lambda: len(replicas(url)) == 2)


def test_a_replica_that_is_killed_takes_only_what_it_had_begun(cluster):
    url = cluster[0] + "/pair"
    before = replicas(url)
    running, waiting, _ = fill(url, "lakes", 400)
    assert metric(url, "num_requests_running") == dict.fromkeys(before, SEQS)
    victim = min(before)
    os.kill(pid_of(victim), signal.SIGKILL)
    for stream in running + waiting:
        stream.join()
    assert sum(stream.error is not None for stream in running) == SEQS
    assert not any(stream.error for stream in waiting)
    lost = [stream for stream in running if stream.error is not None]
    for stream, again in [(stream, Stream(url, stream.question, 400)) for stream in lost]:  # as a client would
        assert stream.error.body["code"] == "engine_dead"  # an event of the stream
        again.join()
        assert (again.error, again.num_tokens) == (None, 400)
        assert again.text.startswith(stream.text)
    wait(lambda: len(replicas(url)) == 2 and victim not in replicas(url))


@pytest.mark.parametrize("fault", [DIES, HANGS], ids=["dies", "hangs"])
def test_an_engine_that_fails_is_replaced_and_what_it_had_not_begun_goes_elsewhere(cluster, fault):
    url, trigger = cluster[0] + "/pair", cluster[1] / str(fault)
    before = wait(lambda: len(found := replicas(url)) == 2 and found)
    expected = chat(url, "Tell me about hills.", max_tokens=12)
    trigger.touch()
    reply = chat(url, "Tell me about hills.", max_tokens=12, seed=fault)
    assert not trigger.exists()  # the fault did happen
    assert reply.json()["choices"] == expected.json()["choices"]
    wait(lambda: len(now := replicas(url)) == 2 and len(now - before) == 1)


def test_replicas_come_and_go_with_the_load(cluster):
    url = cluster[0] + "/elastic"
    wait(lambda: len(replicas(url)) == 1)
    streams = [Stream(url, f"Tell me about {number} towns.", 300) for number in range(8)]
    wait(lambda: len(replicas(url)) == 2)
    more = [Stream(url, f"Tell me about {number} hills.", 50) for number in range(8)]
    wait(lambda: all(metric(url, "num_requests_running").values()))  # the second one has work
    for stream in streams + more:
        stream.join()
        assert stream.error is None  # also those of the replica that leaves
    wait(lambda: len(replicas(url)) == 1)
    assert chat(url, max_tokens=1).status_code == 200


def test_the_processes_of_one_engine_are_one_placement_group(cluster, url):
    reply = chat(cluster[0] + "/parallel", max_tokens=16)
    assert reply.json()["choices"] == chat(url, max_tokens=16).json()["choices"]
    asked = (
        "import json, ray; from ray.util import placement_group_table; ray.init('auto', log_to_driver=False); "
        "print(json.dumps([g for g in placement_group_table().values() if g['state'] == 'CREATED']))"
    )
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    (group,) = json.loads(told.splitlines()[-1])
    assert group["strategy"] == "STRICT_PACK"
    assert list(group["bundles"].values()) == [{"CPU": 3.0}]


def test_health_says_when_no_replica_is_well(cluster):
    url = cluster[0] + "/parallel"
    assert httpx.get(url + "/health", timeout=30).status_code == 200
    (only,) = replicas(url)
    os.kill(pid_of(only), signal.SIGKILL)
    said = set()

    def is_well_again():
        answer = httpx.get(url + "/health", timeout=30)
        if answer.status_code == 200:
            return said
        said.add((answer.status_code, answer.json()["error"]["code"]))
        assert "linalign:http_responses_total" in httpx.get(url + "/metrics", timeout=30).raise_for_status().text
        return False

    wait(is_well_again)  # Ray has replaced it, all three processes
    assert said == {(503, "engine_dead")}
    assert chat(url, max_tokens=4).status_code == 200


def test_replies_outlive_a_deployment_of_what_answers_them(cluster):
    """The old ingress goes on for longer than Ray would let it."""
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
        # It ends when the old ingress has.
        deploying = subprocess.Popen([sys.executable, "-c", redeploy], env=environment, cwd=cluster[1])
        wait(lambda: (now := replicas(url)) and not now & before, deploying)
        until = time.monotonic() + RAYS_GRACE + 5
        while time.monotonic() < until:
            assert "data: {" in (piece := next(pieces)) or piece.startswith(": ping")
    assert deploying.wait(120) == 0
    assert chat(url, max_tokens=4).status_code == 200
    assert chat(url, max_tokens=1000).status_code == 400  # the new one's context


@pytest.mark.parametrize("file", sorted((ROOT / "deploy/ray").glob("*.yaml")), ids=lambda file: file.name)
def test_the_configurations_are_valid(file):
    for one in ServeDeploySchema.model_validate(yaml.safe_load(file.read_text())).applications:
        built = build(one.args)
        known = {"Ingress", "EngineReplica"}
        assert {deployment.name for deployment in one.deployments} <= known
        assert one.import_path == "deploy.ray.application:build"
        assert built


def test_settings_that_mean_nothing_on_ray_are_refused():
    with pytest.raises(ValueError, match=r"port has no meaning here: see http_options\.port"):
        build({"port": 8000})
    with pytest.raises(ValueError, match="modle"):
        build({"modle": "x"})


def test_what_is_wrong_with_settings_is_told_without_their_values():
    with pytest.raises(ValueError, match="api_keys") as told:
        build({"api_keys": [1, "sekret"]})
    assert "sekret" not in str(told.value)


def test_variables_that_are_no_settings_are_refused(monkeypatch):
    monkeypatch.setenv("LINALIGN_MAXNUMSEQS", "4")
    with pytest.raises(ValueError, match="LINALIGN_MAXNUMSEQS; did you mean LINALIGN_MAX_NUM_SEQS"):
        build({})
