"""The Kubernetes manifests: of the right form, strict about privileges, with times that add up."""

import shutil
import subprocess
from functools import reduce
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from persimmon.server.config import Settings, environment_variable, read_settings
from persimmon.server.supervisor import FINAL_ERROR_SECONDS, FLUSH_SECONDS
from tests.deploy import operators
from tests.deploy.files import KUBERNETES, read_yaml

VERSIONS = ("1.30", "1.34", kubernetes_validate.latest_version())
MANIFESTS = ("deployment.yaml", "service.yaml", "disruption_budget.yaml")
OF_OPERATORS = ("monitoring/service_monitor.yaml", "autoscaling/scaled_object.yaml")
"""Of kinds that Kubernetes has only where somebody has installed them; their schemas are not its own."""


@pytest.fixture(scope="module")
def deployment() -> Any:
    return read_yaml(KUBERNETES / "deployment.yaml")


@pytest.fixture(scope="module")
def pod(deployment: Any) -> Any:
    return deployment["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod: Any) -> Any:
    (only,) = pod["containers"]
    return only


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_has_the_form_that_kubernetes_wants(manifest: str, version: str):
    kubernetes_validate.validate(read_yaml(KUBERNETES / manifest), version, strict=True)


def test_the_schemas_refuse_a_misspelt_field(deployment: Any):
    wrong = deployment | {"spec": deployment["spec"] | {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", OF_OPERATORS)
def test_a_manifest_for_an_operator_has_the_form_that_it_wants(manifest: str, version: str):
    operators.validate(read_yaml(KUBERNETES / manifest), version)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("metadata", "label"), {}, "'label' was unexpected"),
        (("spec", "endpoint"), [], "'endpoint' was unexpected"),
        (("spec", "endpoints", 0, "interval"), 15, "15 is not of type 'string'"),
        (("spec", "endpoints", 0, "interval"), "15 s", "'15 s' does not match"),
        (("spec", "endpoints", 0, "scheme"), "HTTPS:", "'HTTPS:' is not one of"),
        (("spec", "selector", "matchLabel"), {}, "'matchLabel' was unexpected"),
    ],
)
def test_the_form_of_a_service_monitor_refuses(path: tuple[str | int, ...], value: Any, named: str):
    _assert_refused(OF_OPERATORS[0], path, value, named)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("spec", "maxReplicas"), 8, "'maxReplicas' was unexpected"),
        (("spec", "pollingInterval"), "15s", "'15s' is not of type 'integer'"),
        (("spec", "scaleTargetRef"), {}, "'name' is a required property"),
        (("spec", "triggers", 0, "metricType"), "Utilization", "'Utilization' is not one of"),
        (("spec", "triggers", 0, "metadata", "threshold"), 8, "8 is not of type 'string'"),
        (("spec", "triggers", 0, "metadata"), {"query": "up", "threshold": "8"}, "'serverAddress' is a required"),
        (("spec", "advanced", "horizontalPodAutoscalerConfig", "behavior", "scaleup"), {}, "'scaleup' was unexpected"),
    ],
)
def test_the_form_of_a_scaled_object_refuses(path: tuple[str | int, ...], value: Any, named: str):
    _assert_refused(OF_OPERATORS[1], path, value, named)


def _assert_refused(manifest: str, path: tuple[str | int, ...], value: Any, named: str) -> None:
    """With another value at a place, a manifest is refused in these words."""
    wrong = read_yaml(KUBERNETES / manifest)
    *outer, last = path
    reduce(lambda part, key: part[key], outer, wrong)[last] = value
    with pytest.raises(jsonschema.ValidationError, match=named):
        operators.validate(wrong, VERSIONS[0])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl puts the parts together")
def test_the_parts_put_together_have_the_form_that_kubernetes_wants(tmp_path: Path):
    shutil.copytree(KUBERNETES, tmp_path, dirs_exist_ok=True)
    everything = read_yaml(KUBERNETES / "kustomization.yaml") | {"components": ["gpu", "monitoring", "autoscaling"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(everything))
    command = ["kubectl", "kustomize", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    resources = list(yaml.safe_load_all(ended.stdout))
    kinds = {"Deployment", "Service", "PodDisruptionBudget", "ServiceMonitor", "ScaledObject"}
    assert {resource["kind"] for resource in resources} == kinds
    for resource in resources:
        if resource["kind"] in operators.SCHEMAS:
            operators.validate(resource, VERSIONS[0])
        else:
            kubernetes_validate.validate(resource, VERSIONS[0], strict=True)
    (container,) = next(each for each in resources if each["kind"] == "Deployment")["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    # What the component adds is in addition to what the Deployment has, not in its place.
    assert {each["mountPath"] for each in container["volumeMounts"]} == {"/tmp", "/model"}
    assert {"PERSIMMON_MODEL", "PERSIMMON_DRAIN_TIMEOUT"} <= {each["name"] for each in container["env"]}


def test_every_file_is_part_of_a_kustomization():
    for folder in [KUBERNETES, *(each for each in KUBERNETES.iterdir() if each.is_dir())]:
        kustomization = read_yaml(folder / "kustomization.yaml")
        named = {*kustomization.get("resources", ()), *(each["path"] for each in kustomization.get("patches", ()))}
        assert named == {each.name for each in folder.glob("*.yaml")} - {"kustomization.yaml"}
    comment = (KUBERNETES / "kustomization.yaml").read_text()
    for folder in KUBERNETES.iterdir():
        assert not folder.is_dir() or f"#   - {folder.name}\n" in comment


def test_the_pod_may_do_nothing_that_it_need_not(pod: Any, container: Any):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
    assert writable == {"/tmp"}


def test_services_do_not_set_the_servers_port(pod: Any, monkeypatch: pytest.MonkeyPatch):
    # What Kubernetes puts into a pod next to a Service named persimmon, unless that is turned off.
    monkeypatch.setenv("PERSIMMON_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(ValueError, match="--port"):
        read_settings({})
    assert pod["enableServiceLinks"] is False


def test_variables_are_settings_of_the_server(container: Any, monkeypatch: pytest.MonkeyPatch):
    (gpu,) = read_yaml(KUBERNETES / "gpu" / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    known = {environment_variable(name) for name in Settings.model_fields}
    for variable in [*container["env"], *gpu["env"]]:
        assert variable["name"] in known
        monkeypatch.setenv(variable["name"], variable["value"])
    read_settings({})


def test_a_pod_has_the_time_that_its_drain_takes(pod: Any, container: Any):
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    (drain,) = (float(each["value"]) for each in container["env"] if each["name"] == "PERSIMMON_DRAIN_TIMEOUT")
    needed = float(seconds) + drain + FINAL_ERROR_SECONDS + FLUSH_SECONDS
    assert needed + 5 <= pod["terminationGracePeriodSeconds"]


def test_endpoints_learn_of_the_end_before_the_server_refuses(container: Any):
    probe, (_, seconds) = container["readinessProbe"], container["lifecycle"]["preStop"]["exec"]["command"]
    assert float(seconds) >= probe["periodSeconds"]


def test_scaling_down_waits_for_drains(pod: Any):
    behavior = read_yaml(KUBERNETES / "autoscaling" / "scaled_object.yaml")["spec"]["advanced"][
        "horizontalPodAutoscalerConfig"
    ]["behavior"]
    (policy,) = behavior["scaleDown"]["policies"]
    assert policy["periodSeconds"] >= pod["terminationGracePeriodSeconds"]


def test_probes_ask_what_they_are_for(container: Any):
    (port,) = container["ports"]
    paths = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",  # a model that loads is not ready, and must not be killed for it
    }
    assert {probe["port"] for probe in paths.values()} == {port["name"]}
    assert port["containerPort"] == 8000  # as the image says


def test_everything_selects_the_pods(deployment: Any):
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    service = read_yaml(KUBERNETES / "service.yaml")
    budget = read_yaml(KUBERNETES / "disruption_budget.yaml")
    monitor = read_yaml(KUBERNETES / "monitoring" / "service_monitor.yaml")
    scaled = read_yaml(KUBERNETES / "autoscaling" / "scaled_object.yaml")
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {each["port"] for each in monitor["spec"]["endpoints"]} <= {
        each["name"] for each in service["spec"]["ports"]
    }
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["spec"]["minReplicaCount"] <= deployment["spec"]["replicas"] <= scaled["spec"]["maxReplicaCount"]
