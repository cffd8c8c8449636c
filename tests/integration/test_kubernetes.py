"""What deploy/kubernetes renders to: valid by real schemas, consistent, as the daemon has it."""

from __future__ import annotations

import copy
import functools
import json
import re
import socket
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
import yaml

from client import HEALTH
from conftest import Site
from daemon import EINSUMD, REPOSITORY, Daemon, run
from kubernetes_schemas import Invalid, validate

FOLDER = REPOSITORY / "deploy/kubernetes"
KUBECTL = Path(sys.prefix) / "bin/kubectl"
RENDERED = ["base", "overlays/gpu", "overlays/gpu-hpa", "overlays/gpu-keda", "kserve"]

SELECTING = {"Deployment", "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "Service"}
# Objects whose keys are the user's, by their own key.
FREE = {"labels", "annotations", "matchLabels", "nodeSelector", "limits", "requests", "data"}


@functools.cache
def render(name: str) -> list[dict]:
    result = run(KUBECTL, "kustomize", FOLDER / name)
    assert result.returncode == 0, result.stderr
    assert "deprecated" not in result.stderr, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def of_kind(name: str, kind: str) -> list[dict]:
    return [resource for resource in render(name) if resource["kind"] == kind]


def objects(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of each object whose fields a schema knows."""
    if isinstance(node, dict):
        free = path and (path[-1] in FREE or path[-1] == "metadata" and "triggers" in path)
        if not free:
            yield path
            for key, value in node.items():
                yield from objects(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from objects(value, (*path, index))


def pod(name: str) -> dict:
    """A pod's specification, or what KServe makes one of."""
    if name == "kserve":
        service = of_kind(name, "InferenceService")[0]
        grace = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
        runtime = of_kind(name, "ServingRuntime")[0]
        return runtime["spec"] | {"terminationGracePeriodSeconds": grace}
    return of_kind(name, "Deployment")[0]["spec"]["template"]["spec"]


def config_of(name: str) -> dict:
    """einsumd.json as the pod finds it."""
    spec = pod(name)
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "config"]
    (found,) = [each for each in of_kind(name, "ConfigMap")
                if each["metadata"]["name"] == volume["configMap"]["name"]]  # fmt: skip
    return found["data"]


def probes(name: str) -> dict[str, dict]:
    (container,) = pod(name)["containers"]
    return {key: probe["grpc"] for key, probe in container.items() if key.endswith("Probe")}


def need_http() -> None:
    if "http_listen" not in run(EINSUMD, "--help-config").stdout:
        pytest.skip("this build has no http_listen")


def test_everything_is_rendered() -> None:
    """No manifest lies beside the kustomizations unused."""
    kinds = {resource["kind"] for name in RENDERED for resource in render(name)}
    assert kinds == {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "InferenceService", "NetworkPolicy",
        "PersistentVolumeClaim", "PodDisruptionBudget", "PodMonitor", "PrometheusRule",
        "ScaledObject", "Service", "ServingRuntime",
    }  # fmt: skip
    for path in FOLDER.rglob("*.yaml"):
        kustomization = yaml.safe_load((path.parent / "kustomization.yaml").read_text())
        assert path.name == "kustomization.yaml" or path.name in json.dumps(kustomization), path


@pytest.mark.parametrize("name", RENDERED)
def test_valid(name: str) -> None:
    for resource in render(name):
        validate(resource)


@pytest.mark.parametrize("name", RENDERED)
def test_a_wrong_field_is_found_anywhere(name: str) -> None:
    """The schemas bite: one field too many, in each object of each manifest in turn."""
    for resource in render(name):
        for path in objects(resource):
            mutant = copy.deepcopy(resource)
            node = mutant
            for step in path:
                node = node[step]
            node["noSuchField"] = 1
            with pytest.raises(Invalid):
                validate(mutant)
                print(f"{resource['kind']} {path} may hold anything")


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("Deployment", "spec.template.spec.terminationGracePeriodSeconds", "1m"),
        ("Deployment", "spec.template.spec.containers.0.livenessProbe.grpc.port", "grpc"),
        ("Service", "spec.ports.0.port", "grpc"),
        ("PersistentVolumeClaim", "spec.accessModes", "ReadOnlyMany"),
        ("PodDisruptionBudget", "spec.selector", []),
        ("NetworkPolicy", "spec.ingress.0.from", {}),
        ("ConfigMap", "data", []),
        ("HorizontalPodAutoscaler", "spec.maxReplicas", "8"),
        ("PodMonitor", "spec.podMetricsEndpoints", {}),
        ("PrometheusRule", "spec.groups.0.rules", {}),
        ("ScaledObject", "spec.triggers.0.metadata.threshold", 0.002),
        ("ServingRuntime", "spec.containers.0.ports", {}),
        ("InferenceService", "spec.predictor.minReplicas", "1"),
    ],
)
def test_a_wrong_type_is_found(kind: str, path: str, wrong: Any) -> None:
    resource = next(each for name in RENDERED for each in of_kind(name, kind))
    mutant = copy.deepcopy(resource)
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    node = mutant
    for step in parents:
        node = node[step]
    assert node[last] != wrong
    node[last] = wrong
    with pytest.raises(Invalid):
        validate(mutant)


@pytest.mark.parametrize("name", RENDERED)
def test_config(name: str, tmp_path: Path) -> None:
    """The daemon accepts it, and the pod gives it the time that it takes to drain."""
    data = config_of(name)
    assert set(data) == {"einsumd.json"}
    config = json.loads(data["einsumd.json"])
    if "http_listen" in config:
        need_http()
    path = tmp_path / "einsumd.json"
    path.write_text(data["einsumd.json"])
    result = run(EINSUMD, "--config", path, "--check-config")
    assert result.returncode == 0, result.stdout + result.stderr
    drain_s = (config["lame_duck_ms"] + config["drain_grace_ms"]) / 1000
    assert pod(name)["terminationGracePeriodSeconds"] >= drain_s + 10


@pytest.mark.parametrize("name", RENDERED)
def test_probes(name: str, small: Site) -> None:
    """They ask where the daemon listens, for what its health service lists."""
    listed = small.client.callable(HEALTH, "List")(
        small.client.message("grpc.health.v1.HealthListRequest"), timeout=60
    ).statuses
    found = probes(name)
    assert set(found) == {"startupProbe", "readinessProbe", "livenessProbe"}
    assert {probe["service"] for probe in found.values()} <= set(listed)
    assert found["livenessProbe"]["service"] == "liveness"
    assert found["readinessProbe"]["service"] == "readiness"
    (listen,) = json.loads(config_of(name)["einsumd.json"])["listen"]
    assert {f"0.0.0.0:{probe['port']}" for probe in found.values()} == {listen}


@pytest.mark.parametrize("name", RENDERED)
def test_ports(name: str) -> None:
    """Whoever names a port of the pod finds it, and the daemon listens there."""
    (container,) = pod(name)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    config = json.loads(config_of(name)["einsumd.json"])
    listens = [*config["listen"], *filter(None, [config.get("http_listen")])]
    assert {f"0.0.0.0:{port}" for port in ports.values()} == set(listens)
    named = [
        *(port["targetPort"] for each in of_kind(name, "Service")
          for port in each["spec"]["ports"]),
        *(port["port"] for each in of_kind(name, "NetworkPolicy")
          for rule in each["spec"]["ingress"] for port in rule["ports"]),
        *(end["port"] for each in of_kind(name, "PodMonitor")
          for end in each["spec"]["podMetricsEndpoints"]),
    ]  # fmt: skip
    assert set(named) <= set(ports)


def test_series(tmp_path: Path) -> None:
    """What scaling asks Prometheus for is on the daemon's page, with the labels asked for."""
    need_http()
    path = f"{tmp_path}/http.sock"
    with Daemon(tmp_path, http_listen=f"unix:{path}"), socket.socket(socket.AF_UNIX) as http:
        http.connect(path)
        http.sendall(b"GET /metrics HTTP/1.1\r\nHost: einsumd\r\nConnection: close\r\n\r\n")
        page = http.makefile().read()
    asked = [
        (series, label)
        for name in RENDERED
        for resource in render(name)
        for series, label in re.findall(r"\b(einsumd_\w+)\{(.*?)\}", json.dumps(resource))
    ]
    assert asked
    for series, label in asked:
        label = label.replace("\\", "")
        assert re.search(rf"^{series}\{{[^}}]*{re.escape(label)}", page, re.M), (series, label)


@pytest.mark.parametrize("name", RENDERED)
def test_mounts_and_selectors(name: str) -> None:
    spec = pod(name)
    (container,) = spec["containers"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert all(mount["readOnly"] for mount in container["volumeMounts"])
    claims = {each["metadata"]["name"] for each in of_kind(name, "PersistentVolumeClaim")}
    assert {volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"]
            if "persistentVolumeClaim" in volume} == claims  # fmt: skip
    if name == "kserve":
        return
    (deployment,) = of_kind(name, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for resource in render(name):
        if resource["kind"] in SELECTING:
            selector = resource["spec"].get("selector") or resource["spec"]["podSelector"]
            wanted = selector.get("matchLabels", selector)
            assert wanted and wanted.items() <= labels.items(), resource["kind"]
    scaled = [each["spec"]["scaleTargetRef"]["name"] for each in render(name)
              if "scaleTargetRef" in each.get("spec", {})]  # fmt: skip
    assert all(target == deployment["metadata"]["name"] for target in scaled)
    assert ("replicas" in deployment["spec"]) == (not scaled)


@pytest.mark.parametrize("name", RENDERED)
def test_the_pod_is_confined(name: str) -> None:
    spec = pod(name)
    (container,) = spec["containers"]
    context = spec.get("securityContext", {}) | container["securityContext"]
    assert context["runAsNonRoot"] and context["runAsUser"] > 0
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert (gpus == "1") == (name != "base")
    assert (spec.get("nodeSelector") == {"nvidia.com/gpu.compute.major": "12"}) == (name != "base")
