"""The RayService: of the right form, and with what the server's own code says about Ray."""

import re
import tomllib
from functools import reduce
from typing import Any

import jsonschema
import pytest
import yaml

from persimmon.server.config import EMBEDDED_GROUPS, listed
from persimmon.server.ray.environment import ENVIRONMENT
from tests.deploy import operators
from tests.deploy.files import DEPLOY, ROOT, read_yaml

MANIFEST = DEPLOY / "ray" / "service.yaml"
VERSION = "1.34"


@pytest.fixture
def service() -> Any:
    return read_yaml(MANIFEST)


@pytest.fixture
def cluster(service: Any) -> Any:
    return service["spec"]["rayClusterConfig"]


def containers(cluster: Any) -> list[Any]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def application(service: Any) -> Any:
    (only,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return only


def test_the_manifest_has_the_form_that_kuberay_wants(service: Any):
    operators.validate(service, VERSION)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("spec", "serveConfig"), "", "'serveConfig' was unexpected"),
        (("spec", "rayClusterConfig", "rayVersion"), 2.6, "2.6 is not of type 'string'"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplica"), 1, "'minReplica' was unexpected"),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
    ],
)
def test_the_form_of_a_ray_service_refuses(service: Any, path: tuple[str | int, ...], value: Any, named: str):
    *outer, last = path
    reduce(lambda part, key: part[key], outer, service)[last] = value
    with pytest.raises(jsonschema.ValidationError, match=named):
        operators.validate(service, VERSION)


def test_every_process_of_ray_has_the_variables_of_a_cluster_that_the_application_starts(cluster: Any):
    for container in containers(cluster):
        assert {each["name"]: each["value"] for each in container["env"]} == ENVIRONMENT


def test_the_guide_lists_the_variables():
    guide = (ROOT / "docs" / "guides" / "ray.md").read_text()
    assert dict(re.findall(r"^\| `(RAY_\w+)=(\S+)` \|", guide, re.MULTILINE)) == ENVIRONMENT


def test_ray_has_the_version_that_is_tested(cluster: Any):
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    assert requirement == f"ray[serve]=={cluster['rayVersion']}"
    assert f"ray:{cluster['rayVersion']}-py311" in (DEPLOY / "ray" / "Dockerfile").read_text()


def test_a_pod_of_the_group_holds_the_replica_that_is_asked_for(service: Any, cluster: Any):
    arguments, (group,) = application(service)["args"], cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == arguments["num_gpus"]
    assert int(container["resources"]["requests"]["cpu"]) == arguments["num_cpus"]
    assert (group["minReplicas"], group["maxReplicas"]) == (arguments["num_replicas"], arguments["max_replicas"])
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [arguments["model"]]
    of_placement = {"num_replicas", "max_replicas", "num_cpus", "num_gpus"}
    assert set(arguments) <= of_placement | {name for name, _ in listed(EMBEDDED_GROUPS)}
