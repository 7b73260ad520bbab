"""The Kubernetes manifests against Kubernetes' schemas and against the server's real settings and metrics."""

import re
from importlib.metadata import version
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from linalign.ray.application import build
from linalign.server.metrics import ENGINE_METRICS
from linalign.server.settings import Settings
from linalign.server.settings_loading import load_settings

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
RELEASE = "1.34"  # of Kubernetes; kubernetes-validate includes its schema
MANIFESTS = [
    manifest for file in ("linalign.yaml", "cache.yaml") for manifest in yaml.safe_load_all((FOLDER / file).read_text())
]
SERVICE = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())

# A schema of the parts of KubeRay's RayService that we use, written after its Go types (ray-operator/apis/ray/v1).
COUNT = {"type": "integer", "minimum": 0}
PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}


def object_schema(required, **properties):
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


RAY_SERVICE = object_schema(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata={"type": "object"},
    spec=object_schema(
        ["serveConfigV2", "rayClusterConfig"],
        serveConfigV2={"type": "string"},
        rayClusterConfig=object_schema(
            ["headGroupSpec"],
            rayVersion={"type": "string"},
            authOptions=object_schema([], mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=object_schema([], idleTimeoutSeconds=COUNT, upscalingMode={"type": "string"}),
            headGroupSpec=object_schema(["template"], rayStartParams=PARAMS, template={"type": "object"}),
            workerGroupSpecs={
                "type": "array",
                "items": object_schema(
                    ["groupName", "minReplicas", "maxReplicas", "template"],
                    groupName={"type": "string"},
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    numOfHosts=COUNT,
                    rayStartParams=PARAMS,
                    template={"type": "object"},
                ),
            },
        ),
    ),
)


def of_kind(kind):
    (manifest,) = [manifest for manifest in MANIFESTS if manifest["kind"] == kind]
    return manifest


def pods():
    """(name, template) of every pod that the manifests create."""
    cluster = SERVICE["spec"]["rayClusterConfig"]
    workers = [(group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"]]
    server = of_kind("Deployment")["spec"]["template"]
    return [("server", server), ("head", cluster["headGroupSpec"]["template"]), *workers]


def test_the_schemas_detect_errors():
    broken = yaml.safe_load(yaml.safe_dump(of_kind("Deployment")))
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(broken, RELEASE, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_the_manifests_are_valid(manifest):
    kubernetes_validate.validate(manifest, RELEASE, strict=True)


@pytest.mark.parametrize(("name", "template"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_pods_are_valid_and_unprivileged(name, template):
    manifest = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
    kubernetes_validate.validate(manifest, RELEASE, strict=True)
    assert template["spec"]["securityContext"]["runAsNonRoot"]
    assert template["spec"]["enableServiceLinks"] is False  # see the next test
    (container,) = template["spec"]["containers"]
    assert container["image"].startswith(f"linalign:{version('linalign')}")
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume
    }
    assert claims == {of_kind("PersistentVolumeClaim")["metadata"]["name"]}


@pytest.mark.parametrize("file", ["linalign.yaml", "rayservice.yaml"])
def test_a_manifest_names_its_requirements(file):
    text = (FOLDER / file).read_text()
    (secret,) = re.findall(r"secretName: ([\w-]+)", text)
    assert f"kubectl create secret generic {secret} --from-file=api-keys=" in text
    assert f"kubectl apply -f deploy/kubernetes/cache.yaml -f deploy/kubernetes/{file}" in text


def test_variables_of_a_kubernetes_service_are_refused(monkeypatch):
    """Variables that Kubernetes sets in each pod for a Service named "linalign", unless enableServiceLinks is false."""
    for name, value in (("SERVICE_HOST", "10.0.0.1"), ("SERVICE_PORT", "80"), ("PORT", "tcp://10.0.0.1:80")):
        monkeypatch.setenv("LINALIGN_" + name, value)
    with pytest.raises(ValueError, match="enableServiceLinks: false"):
        load_settings([])
    with pytest.raises(ValueError, match="enableServiceLinks: false"):
        build({})


def test_the_server_of_the_deployment_starts_with_its_settings(monkeypatch):
    (container,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        if variable["name"] != "LINALIGN_API_KEYS_FILE":  # comes from a secret in the cluster
            monkeypatch.setenv(variable["name"], variable["value"])
    monkeypatch.setenv("LINALIGN_API_KEYS", "key")
    command, *args = container["args"]
    assert command == "serve"
    settings = load_settings(args)
    assert settings.log_format == "json"
    assert "api_keys_file" in Settings.model_fields
    spec = of_kind("Deployment")["spec"]["template"]["spec"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > pause + settings.shutdown_timeout


def test_all_manifests_select_the_same_pods():
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert of_kind("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert of_kind("Service")["spec"]["selector"] == labels
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    target = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", of_kind("Deployment")["metadata"]["name"])


def test_prometheus_finds_the_pods_under_the_right_job():
    (monitor,) = yaml.safe_load_all((FOLDER / "podmonitor.yaml").read_text())
    template = of_kind("Deployment")["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    job = template["metadata"]["labels"][monitor["spec"]["jobLabel"]]
    rules = (FOLDER.parent / "prometheus/alerts.yml").read_text()
    assert set(re.findall(r'job="([^"]*)"', rules)) == {job}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (container,) = template["spec"]["containers"]
    assert endpoint["port"] in [port["name"] for port in container["ports"]]
    assert {"name": "LINALIGN_METRICS_WITHOUT_KEY", "value": "true"} in container["env"]


def test_the_autoscaler_uses_an_existing_metric():
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (metric,) = of_kind("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    metric_names = {f"linalign:{name}" for _, name, *_ in ENGINE_METRICS}
    (pattern,) = re.findall(r'__name__=~"([^"]+)"', rule["metricsQuery"])
    assert {name for name in metric_names if re.fullmatch(pattern, name)} == {
        "linalign:num_requests_running",
        "linalign:num_requests_waiting",
    }
    (series_name,) = re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])
    assert series_name in metric_names


def test_the_ray_service_is_valid():
    jsonschema.validate(SERVICE, RAY_SERVICE)
    cluster = SERVICE["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == version("ray")
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"])).applications
    application.args.pop("api_keys_file")  # comes from a secret in the cluster
    assert application.import_path == "linalign.ray.application:build"
    assert build({**application.args, "api_keys": "key"})
    (engines,) = [d for d in application.deployments if d.name == "EngineReplica"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["maxReplicas"] >= engines.autoscaling_config["max_replicas"]  # one GPU per replica
