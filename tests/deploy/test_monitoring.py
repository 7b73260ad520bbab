"""compose.yaml and the files that it mounts: Prometheus's rules, Grafana's dashboard, and the queries of both."""

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from linalign.server.settings import Settings
from linalign.server.shutdown import CLOSE_TIMEOUT, ERROR_DELIVERY_TIME
from tests.serving import KEY, free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
_spec = importlib.util.spec_from_file_location("draw", DEPLOY / "grafana/draw.py")  # a script outside any package
draw = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(draw)
NAME = r"\b(?:linalign:|process_)\w+"  # names of metrics in queries and documents


@pytest.fixture(scope="module")
def panels():
    return json.loads((DEPLOY / "grafana/linalign.json").read_text())["panels"]


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


@pytest.fixture(scope="module")
def exported(url):
    """The series names of /metrics that queries can use, by metric."""
    families = text_string_to_metric_families(httpx.get(url + "/metrics").text)
    return {
        family.name: {family.name + suffix for suffix in SUFFIXES[family.type]}
        for family in families
        if not family.name.endswith("_created")
    }


def expressions(panels):
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def alerts():
    groups = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_queries_use_existing_metrics(panels, exported):
    queried = set(re.findall(NAME, "\n".join([*expressions(panels), *alerts()])))
    assert queried
    assert queried <= set().union(*exported.values())


def test_every_metric_of_the_server_is_on_the_dashboard_and_in_the_document(panels, exported):
    names = {name for name in exported if name.startswith("linalign:")}
    shown = set(re.findall(NAME, "\n".join(expressions(panels))))
    documented = set(re.findall(NAME, (ROOT / "docs/monitoring.md").read_text()))
    assert [name for name in names if not exported[name] & shown] == []
    assert [name for name in names if not {name, *exported[name]} & documented] == []
    assert documented <= set(exported).union(*exported.values())


def test_panels_have_what_grafana_and_readers_need(panels):
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all('{job=~"$job",instance=~"$instance"' in target["expr"] for target in panel["targets"])


def test_the_parts_of_the_composition_match(services):
    for service in services.values():
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            assert not source.startswith(".") or (ROOT / source).exists()
            assert target.startswith("/")
        assert all(re.match(r"(127\.0\.0\.1:|\$\{\w+:-127\.0\.0\.1:)", port) for port in service["ports"])
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    shutdown = Settings.model_fields["shutdown_timeout"].default + CLOSE_TIMEOUT + ERROR_DELIVERY_TIME
    assert int(services["linalign"]["stop_grace_period"].removesuffix("s")) > shutdown

    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    provisioning = DEPLOY / "grafana/provisioning"
    provider = yaml.safe_load((provisioning / "dashboards/linalign.yaml").read_text())["providers"][0]
    assert provider["options"]["path"] + "/linalign.json" in mounted
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in mounted
    source = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"][0]
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert source["url"] == "http://prometheus:" + services["prometheus"]["ports"][0].rsplit(":", 1)[1]
    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == [
        "linalign:" + services["linalign"]["ports"][0].rsplit(":", 1)[1]
    ]


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml"])
def test_the_composition_fits_the_schema_of_compose(file, tmp_path):
    right, wrong = ROOT / file, tmp_path / file
    wrong.write_text(right.read_text().replace("image:", "imag:"))
    schema = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    assert [subprocess.run([*schema, text], capture_output=True).returncode for text in (right, wrong)] == [0, 1]


def test_alerts_fire_only_when_they_should():
    skip_without("promtool")
    for command in ("check config prometheus.yml", "test rules alerts_test.yml"):
        done = subprocess.run(["promtool", *command.split()], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_the_dashboard_has_data(url, tmp_path, panels):
    with prometheus(url, tmp_path) as client:
        deadline = time.monotonic() + 120
        while value(client, "count_over_time(linalign:num_requests_running[1h])") < 8 or not rules_are_known(client):
            assert time.monotonic() < deadline
            send_one_of_each(url)
        command = [sys.executable, DEPLOY / "grafana/draw.py", client.base_url, tmp_path / "dashboard.png"]
        options = ["--minutes", "1", "--scrape-interval", "1"]
        done = subprocess.run([*map(str, command), *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "dashboard.png").stat().st_size > 0
        assert {rule["health"] for rule in rules(client)} == {"ok"}
        assert value(client, "count(up)") == 2
        assert {title: newest(panels, title, client) for title in ("Servers up", "Uptime")} == {
            "Servers up": [1],
            "Uptime": [pytest.approx(value(client, 'time() - process_start_time_seconds{job="linalign"}'), abs=2)],
        }


def test_a_server_with_keys_is_scraped_with_one(closed, tmp_path):
    (tmp_path / "api-key").write_text(KEY)

    def uncommented(config):
        return re.sub(r"# ( *(?:authorization|credentials_file):)", r"\1", config)

    with prometheus(closed, tmp_path, uncommented) as client:
        deadline = time.monotonic() + 60
        while value(client, 'up{job="linalign"}') != 1:
            assert time.monotonic() < deadline


def skip_without(program):
    if shutil.which(program) is None:
        pytest.skip(f"the monitoring was not run: {program} is not installed (Debian's package prometheus)")


@contextlib.contextmanager
def prometheus(url, folder, change=lambda text: text):
    """Run Prometheus with our configuration, but another address and shorter intervals. Yields a client of it."""
    skip_without("prometheus")
    config = (DEPLOY / "prometheus/prometheus.yml").read_text()
    config = config.replace("15s", "1s").replace("linalign:8000", url.removeprefix("http://"))
    address = f"127.0.0.1:{free_port()}"
    config += f"  - job_name: prometheus\n    static_configs: [targets: ['{address}']]\n"  # as is usual
    (folder / "prometheus.yml").write_text(change(config))
    shutil.copy(DEPLOY / "prometheus/alerts.yml", folder)
    command = [
        "prometheus",
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        "--web.listen-address",
        address,
    ]
    with (
        subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://{address}") as client,
    ):
        try:
            deadline = time.monotonic() + 60
            while True:
                assert process.poll() is None, "Prometheus ended before it was ready"
                assert time.monotonic() < deadline
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/-/ready").status_code == 200:
                        break
                time.sleep(0.1)
            yield client
        finally:
            process.terminate()


def value(client, expression):
    """Current value of the expression's only series; 0 if there is none yet."""
    time.sleep(0.1)
    result = client.get("/api/v1/query", params={"query": expression}).json()["data"]["result"]
    return float(result[0]["value"][1]) if result else 0


def newest(panels, title, client):
    """Current values of the panel's series, with all servers selected."""
    (panel,) = [panel for panel in panels if panel["title"] == title]
    span = (time.time() - 60, time.time(), 1)
    variables = {f"${label}": draw.all_of(client, label, span) for label in ("job", "instance")}
    return [values[-1] for target in draw.series_of(client, panel, variables, span) for _, _, values in target]


def rules(client):
    return [rule for group in client.get("/api/v1/rules").json()["data"]["groups"] for rule in group["rules"]]


def rules_are_known(client):
    return all(rule["health"] != "unknown" for rule in rules(client))


def send_one_of_each(url):
    """Send requests for a plain reply, an aligned one with a trace, and one that is refused."""
    chat = {"model": "smollm2", "messages": [{"role": "user", "content": "How do I get to work?"}], "max_tokens": 8}
    aligned = {"principle": "Encourage cycling.", "alignment_trace": True}
    for extra, status in (({}, 200), (aligned, 200), ({"temprature": 1}, 400)):
        assert httpx.post(url + "/v1/chat/completions", json=chat | extra, timeout=60).status_code == status
