"""The manifests: valid by the schemas of Kubernetes, KubeRay and the Prometheus operator, and fitting the service."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.http.middleware import QUIET_ROUTES
from service.launch.haproxy import SCRIPT
from service.launch.supervisor import STOP_AFTER_S
from service.settings import read_settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(FOLDER.rglob("*.yaml"))
CUSTOM_GROUPS = ("ray.io", "monitoring.coreos.com")
WRITABLE = {"/tmp", "/dev/shm", "/home/reward/.cache"}  # noqa: S108 - paths in the container
CRD_FOLDER = os.environ.get("CRD_SCHEMAS")
"""Folder with the CustomResourceDefinition files of KubeRay and of the Prometheus operator, as released."""


@cache
def parsed() -> list[dict[str, Any]]:
    return [document for path in FILES for document in yaml.safe_load_all(path.read_text())]


def documents() -> list[dict[str, Any]]:
    """All manifests, which a test may change."""
    return deepcopy(parsed())


def of_kind(kind: str, name: str | None = None) -> dict[str, Any]:
    """The one manifest of a kind, or the one with a name."""
    [found] = [
        document
        for document in documents()
        if document["kind"] == kind and name in (None, document["metadata"]["name"])
    ]
    return found


def name_of(document: dict[str, Any]) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def is_custom(document: dict[str, Any]) -> bool:
    return str(document["apiVersion"]).split("/")[0] in CUSTOM_GROUPS


def ray_templates() -> dict[str, dict[str, Any]]:
    cluster = of_kind("RayService")["spec"]["rayClusterConfig"]
    [worker] = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"]["template"], "worker": worker["template"]}


def pod_templates() -> dict[str, dict[str, Any]]:
    return {"deployment": of_kind("Deployment")["spec"]["template"], **ray_templates()}


def pod_labels() -> dict[str, dict[str, str]]:
    """Labels of the pods by template; KubeRay adds the type of node."""
    return {
        name: template["metadata"]["labels"] | ({} if name == "deployment" else {"ray.io/node-type": name})
        for name, template in pod_templates().items()
    }


def selected(labels: dict[str, str]) -> set[str]:
    """The templates whose pods a selector matches."""
    return {name for name, of_pod in pod_labels().items() if labels.items() <= of_pod.items()}


def strict(schema: Any) -> Any:
    """The schema of a custom resource with unknown keys refused, as kubectl's strict validation does."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: strict(value) for key, value in schema.items()}
    if isinstance(changed.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        changed.setdefault("additionalProperties", False)
    return changed


@cache
def custom_schemas() -> dict[tuple[str, str], Any]:
    """The strict schemas by apiVersion and kind; skips where there are none."""
    if CRD_FOLDER is None:
        pytest.skip("CRD_SCHEMAS names no folder with CustomResourceDefinitions of KubeRay and the Prometheus operator")
    found: dict[tuple[str, str], Any] = {}
    for path in Path(CRD_FOLDER).rglob("*.yaml"):
        for definition in yaml.load_all(path.read_text(), yaml.CSafeLoader):  # large files; still the safe loader
            if not definition or definition.get("kind") != "CustomResourceDefinition":
                continue
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = version["schema"]["openAPIV3Schema"]
                schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = strict(schema)
    return found


def custom_errors(document: dict[str, Any]) -> list[str]:
    import jsonschema  # type: ignore[import-untyped]

    schema = custom_schemas()[document["apiVersion"], document["kind"]]
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def refuse_unknown_keys(document: dict[str, Any]) -> None:
    """Validate a manifest of Kubernetes itself; raises on the first error."""
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed; it has the schemas of Kubernetes"
    )
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("document", [entry for entry in documents() if not is_custom(entry)], ids=name_of)
def test_manifest_is_valid(document: dict[str, Any]) -> None:
    """The schema of the newest known Kubernetes accepts the manifest, unknown keys refused."""
    refuse_unknown_keys(document)


@pytest.mark.parametrize("name", ["head", "worker"])
def test_ray_pods_are_valid(name: str) -> None:
    """The pod templates inside the RayService are valid pods of Kubernetes, unknown keys refused."""
    template = ray_templates()[name]
    refuse_unknown_keys({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]})


def test_misspelt_key_of_a_manifest_is_found() -> None:
    """A key that Kubernetes does not know is refused, so the tests above can fail."""
    deployment = of_kind("Deployment")
    deployment["spec"]["templates"] = {}

    with pytest.raises(Exception, match="templates"):
        refuse_unknown_keys(deployment)


@pytest.mark.parametrize("document", [entry for entry in documents() if is_custom(entry)], ids=name_of)
def test_custom_resource_is_valid(document: dict[str, Any]) -> None:
    """The definition of the custom resource accepts the manifest, unknown keys refused."""
    assert custom_errors(document) == []


def test_misspelt_key_of_a_custom_resource_is_found() -> None:
    """A misspelt key and a wrong type in the RayService are refused, so the test above can fail."""
    service = of_kind("RayService")
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] = "two"
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["templates"] = {}

    errors = custom_errors(service)

    assert len(errors) == 2
    assert any("templates" in error for error in errors)


def probes() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, template in pod_templates().items():
        [container] = template["spec"]["containers"]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if kind in container:
                yield f"{name} {kind}", container, container[kind]["httpGet"]


def test_probes_ask_routes_that_exist() -> None:
    """Each probe on the HTTP port asks a route of the service, the others Ray's own health check."""
    ports = {}
    for name, container, get in probes():
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        port = named.get(get["port"], get["port"])
        ports[name] = (port, get["path"])
        assert get["path"] in QUIET_ROUTES if port == 8000 else (port, get["path"]) == (52365, "/api/healthz"), name

    assert ports["deployment readinessProbe"] == ports["worker readinessProbe"] == (8000, "/readyz")
    assert ports["deployment livenessProbe"] == (8000, "/livez")


def test_pods_outlive_the_drain() -> None:
    """A pod that is deleted is killed only after the service has ended by itself."""
    spec = of_kind("Deployment")["spec"]["template"]["spec"]
    waits = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]

    assert spec["terminationGracePeriodSeconds"] > waits + STOP_AFTER_S


@pytest.mark.parametrize("name", ["deployment", "head", "worker"])
def test_pods_are_restricted(name: str) -> None:
    """Pods run as the image's user without privileges on a read-only root, with the writable folders it needs."""
    spec = pod_templates()[name]["spec"]
    [container] = spec["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}

    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(mounts) == WRITABLE
    assert set(mounts.values()) <= set(volumes)
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert "memory" in container["resources"]["limits"]
    assert not spec["automountServiceAccountToken"]
    # Otherwise a Service named reward adds REWARD_PORT and the like, at which the start command ends.
    assert not spec["enableServiceLinks"]


def test_selectors_match_the_pods() -> None:
    """Service, budgets, network policies and monitors select the pods they are meant for, and no others."""
    found = {
        name_of(document): selected(selector.get("matchLabels", selector))
        for document in documents()
        if (selector := document["spec"].get("selector") or document["spec"].get("podSelector")) is not None
    }

    assert found == {
        "Deployment reward": {"deployment"},
        "Service reward": {"deployment"},
        "PodDisruptionBudget reward": {"deployment"},
        "NetworkPolicy reward": {"deployment"},
        "PodMonitor reward": {"deployment"},
        "PodDisruptionBudget reward-ray-workers": {"worker"},
        "PodDisruptionBudget reward-ray-head": {"head"},
        "NetworkPolicy reward-ray": {"head", "worker"},
        "PodMonitor reward-ray": {"head"},  # its /metrics has the samples of all replicas
    }


@pytest.mark.parametrize(("name", "template"), [("reward", "deployment"), ("reward-ray", "head")])
def test_monitors_scrape_as_the_alerts_expect(name: str, template: str) -> None:
    """The monitor scrapes /metrics on a port that the pod names, under the job that the alerts name."""
    [endpoint] = of_kind("PodMonitor", name)["spec"]["podMetricsEndpoints"]
    [container] = pod_templates()[template]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    [job] = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]

    assert (endpoint["path"], ports[endpoint["port"]]) == ("/metrics", 8000)
    assert endpoint["relabelings"] == [{"action": "replace", "targetLabel": "job", "replacement": job["job_name"]}]
    assert endpoint["scrapeTimeout"] == job["scrape_timeout"]


@pytest.mark.parametrize("name", ["reward", "reward-ray"])
def test_clients_reach_the_http_port_alone(name: str) -> None:
    """Trainers and Prometheus are let in to the HTTP port; Ray's ports are open to its own pods and to KubeRay."""
    for rule in of_kind("NetworkPolicy", name)["spec"]["ingress"]:
        sources = str(rule["from"])
        if "reward-client" in sources or "monitoring" in sources:
            assert rule["ports"] == [{"protocol": "TCP", "port": 8000}]
        else:
            assert "reward-ray" in sources or "kuberay-operator" in sources


def test_serve_config_is_the_one_of_the_repository() -> None:
    """The RayService has serve_config.yaml, apart from what a cluster with GPUs and API keys changes."""
    config = yaml.safe_load(of_kind("RayService")["spec"]["serveConfigV2"])
    expected = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    [application] = expected["applications"]
    expected["http_options"]["host"] = "0.0.0.0"  # noqa: S104 - the network policy closes it
    application["args"]["model"]["path"] = "/models/mine"
    application["args"]["security"] = {
        "authentication": "required",
        "api_keys": "/keys/keys.yaml",
        "public_metrics": True,
    }
    application["deployments"][0]["num_replicas"] = 2
    application["deployments"][0]["max_surge_percent"] = 0
    application["deployments"][0]["ray_actor_options"]["num_gpus"] = 1

    assert config == expected
    read_settings(config["applications"][0]["args"])


def test_ray_environment_is_the_documented_one() -> None:
    """Head and workers start Ray with docs/serve.env and haproxy.sh, without the token, which KubeRay makes."""
    lines = (ROOT / "docs" / "serve.env").read_text().splitlines()
    expected = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    del expected["RAY_AUTH_MODE"], expected["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]
    expected["RAY_SERVE_HAPROXY_BINARY_PATH"] = f"/opt/service/{SCRIPT.relative_to(ROOT)}"  # as the image has it

    for name, template in ray_templates().items():
        env = {entry["name"]: entry["value"] for entry in template["spec"]["containers"][0]["env"]}
        assert env == expected, name
    assert of_kind("RayService")["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_ray_cluster_fits_the_service() -> None:
    """Ray's version is the pinned one, there are workers for all replicas, and old clusters outlive their requests."""
    spec = of_kind("RayService")["spec"]
    cluster = spec["rayClusterConfig"]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    [deployment] = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["deployments"]
    [worker] = cluster["workerGroupSpecs"]
    [container] = worker["template"]["spec"]["containers"]

    assert f"ray[serve]=={cluster['rayVersion']}" in dependencies
    assert worker["replicas"] == deployment["num_replicas"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["rayClusterDeletionDelaySeconds"] > deployment["graceful_shutdown_timeout_s"]
