"""The manifests, against Kubernetes' own schemas and against what the server really has."""

import re
from importlib.metadata import version
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.ray.application import build
from server.metrics import ENGINE
from server.settings import Settings, load_settings

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
RELEASE = "1.34"  # of Kubernetes; a schema of it is in kubernetes-validate
MANIFESTS = list(yaml.safe_load_all((FOLDER / "linalign.yaml").read_text()))
SERVICE = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())

# What KubeRay's RayService has of what we use, after its Go types (ray-operator/apis/ray/v1, ray.io/v1).
COUNT = {"type": "integer", "minimum": 0}
PARAMS = {"type": "object", "additionalProperties": {"type": "string"}}


def thing(required, **properties):
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


RAY_SERVICE = thing(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata={"type": "object"},
    spec=thing(
        ["serveConfigV2", "rayClusterConfig"],
        serveConfigV2={"type": "string"},
        rayClusterConfig=thing(
            ["headGroupSpec"],
            rayVersion={"type": "string"},
            enableInTreeAutoscaling={"type": "boolean"},
            autoscalerOptions=thing([], idleTimeoutSeconds=COUNT, upscalingMode={"type": "string"}),
            headGroupSpec=thing(["template"], rayStartParams=PARAMS, template={"type": "object"}),
            workerGroupSpecs={
                "type": "array",
                "items": thing(
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
    (found,) = [manifest for manifest in MANIFESTS if manifest["kind"] == kind]
    return found


def pods():
    """(name, template) of every pod that the manifests make."""
    cluster = SERVICE["spec"]["rayClusterConfig"]
    workers = [(group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"]]
    server = of_kind("Deployment")["spec"]["template"]
    return [("server", server), ("head", cluster["headGroupSpec"]["template"]), *workers]


def test_the_schemas_notice_what_is_wrong():
    broken = yaml.safe_load(yaml.safe_dump(of_kind("Deployment")))
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(broken, RELEASE, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_the_manifests_are_valid(manifest):
    kubernetes_validate.validate(manifest, RELEASE, strict=True)


@pytest.mark.parametrize(("name", "template"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_pods_are_valid_and_have_little_power(name, template):
    manifest = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
    kubernetes_validate.validate(manifest, RELEASE, strict=True)
    assert template["spec"]["securityContext"]["runAsNonRoot"]
    (container,) = template["spec"]["containers"]
    assert container["image"].startswith(f"linalign:{version('linalign')}")
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_server_of_the_deployment_starts_with_its_settings(monkeypatch):
    (container,) = of_kind("Deployment")["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        if variable["name"] != "LINALIGN_API_KEYS_FILE":  # a secret of the cluster
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


def test_all_of_them_mean_the_same_pods():
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert of_kind("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert of_kind("Service")["spec"]["selector"] == labels
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    target = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", of_kind("Deployment")["metadata"]["name"])


def test_the_autoscaler_looks_at_a_metric_that_there_is():
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (metric,) = of_kind("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    known = {f"linalign:{name}" for _, name, *_ in ENGINE}
    (pattern,) = re.findall(r'__name__=~"([^"]+)"', rule["metricsQuery"])
    assert {name for name in known if re.fullmatch(pattern, name)} == {
        "linalign:num_requests_running",
        "linalign:num_requests_waiting",
    }
    (asked,) = re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])
    assert asked in known


def test_the_ray_service_is_valid():
    jsonschema.validate(SERVICE, RAY_SERVICE)
    cluster = SERVICE["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == version("ray")
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"])).applications
    application.args.pop("api_keys_file")  # a secret of the cluster
    assert application.import_path == "deploy.ray.application:build"
    assert build({**application.args, "api_keys": "key"})
    (engines,) = [d for d in application.deployments if d.name == "EngineReplica"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["maxReplicas"] >= engines.autoscaling_config["max_replicas"]  # a GPU each
