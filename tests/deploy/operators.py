"""The form of what operators add to Kubernetes: ServiceMonitor, ScaledObject (KEDA) and RayService (KubeRay).

Written after the operators' documentation: the API reference of the Prometheus operator, KEDA's "ScaledObject
specification" and its Prometheus scaler, and KubeRay's API reference.  Holds the fields that have little inside; any
other is refused, like a misspelt one, until it is looked up there and added here.  What is Kubernetes' own is left to
Kubernetes' schemas.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer", "minimum": 0}
SWITCH: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "array", "items": TEXT}
QUOTED_NUMBER: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}
QUOTED_SWITCH: Schema = {"enum": ["true", "false"]}
KUBERNETES_OWN: Schema = {"type": "object"}
"""See `_kubernetes_own`."""
DURATION: Schema = {
    "type": "string",
    "pattern": r"^(0|(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?)$",
    "minLength": 1,
}
"""As Prometheus writes it, like 15s or 1m30s."""


def _closed(fields: Mapping[str, Schema], *required: str) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": dict(fields), "required": list(required), "additionalProperties": False}


def _resource(api_version: str, kind: str, spec: Schema) -> Schema:
    fields = {"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": KUBERNETES_OWN, "spec": spec}
    return _closed(fields, *fields)


ENDPOINT = _closed(
    {
        **dict.fromkeys(("interval", "scrapeTimeout"), DURATION),
        **dict.fromkeys(("enableHttp2", "filterRunning", "followRedirects"), SWITCH),
        **dict.fromkeys(("honorLabels", "honorTimestamps", "trackTimestampsStaleness"), SWITCH),
        **dict.fromkeys(("path", "port"), TEXT),
        "params": {"type": "object", "additionalProperties": TEXTS},
        "scheme": {"enum": ["http", "https"]},
        "targetPort": {"type": ["integer", "string"]},
    }
)
SERVICE_MONITOR = _resource(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    _closed(
        {
            **dict.fromkeys(("labelLimit", "labelNameLengthLimit", "labelValueLengthLimit"), NUMBER),
            **dict.fromkeys(("keepDroppedTargets", "sampleLimit", "targetLimit"), NUMBER),
            **dict.fromkeys(("podTargetLabels", "targetLabels"), TEXTS),
            **dict.fromkeys(("jobLabel", "scrapeClass"), TEXT),
            "endpoints": {"type": "array", "items": ENDPOINT, "minItems": 1},
            "namespaceSelector": _closed({"any": SWITCH, "matchNames": TEXTS}),
            "selector": KUBERNETES_OWN,
        },
        "endpoints",
        "selector",
    ),
)
PROMETHEUS_TRIGGER = _closed(
    {
        "type": {"const": "prometheus"},
        "name": TEXT,
        "metricType": {"enum": ["AverageValue", "Value"]},  # Utilization is of processor and memory
        "useCachedMetrics": SWITCH,
        "authenticationRef": _closed({"name": TEXT, "kind": TEXT}, "name"),
        # Texts all: KEDA makes numbers of them itself.
        "metadata": _closed(
            {
                **dict.fromkeys(("serverAddress", "query", "queryParameters", "namespace", "customHeaders"), TEXT),
                **dict.fromkeys(("threshold", "activationThreshold"), QUOTED_NUMBER),
                **dict.fromkeys(("ignoreNullValues", "unsafeSsl"), QUOTED_SWITCH),
                "authModes": TEXT,
                "timeout": TEXT,
            },
            "serverAddress",
            "query",
            "threshold",
        ),
    },
    "type",
    "metadata",
)
SCALED_OBJECT = _resource(
    "keda.sh/v1alpha1",
    "ScaledObject",
    _closed(
        {
            **dict.fromkeys(("pollingInterval", "cooldownPeriod", "initialCooldownPeriod"), NUMBER),
            **dict.fromkeys(("idleReplicaCount", "minReplicaCount"), NUMBER),
            "maxReplicaCount": {"type": "integer", "minimum": 1},
            "scaleTargetRef": _closed(
                dict.fromkeys(("apiVersion", "kind", "name", "envSourceContainerName"), TEXT), "name"
            ),
            "fallback": _closed(
                {
                    **dict.fromkeys(("failureThreshold", "replicas"), NUMBER),
                    "behavior": {
                        "enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]
                    },
                },
                "failureThreshold",
                "replicas",
            ),
            "advanced": _closed(
                {
                    "restoreToOriginalReplicaCount": SWITCH,
                    "horizontalPodAutoscalerConfig": _closed({"name": TEXT, "behavior": KUBERNETES_OWN}),
                }
            ),
            "triggers": {"type": "array", "items": PROMETHEUS_TRIGGER, "minItems": 1},
        },
        "scaleTargetRef",
        "triggers",
    ),
)
_POD_GROUP = {"rayStartParams": {"type": "object", "additionalProperties": TEXT}, "template": KUBERNETES_OWN}
WORKER_GROUP = _closed(
    {
        **_POD_GROUP,
        **dict.fromkeys(("idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "replicas"), NUMBER),
        "groupName": TEXT,
    },
    "groupName",
    "template",
)
RAY_SERVICE = _resource(
    "ray.io/v1",
    "RayService",
    _closed(
        {
            "serveConfigV2": TEXT,
            "rayClusterConfig": _closed(
                {
                    "rayVersion": TEXT,
                    "enableInTreeAutoscaling": SWITCH,
                    "headGroupSpec": _closed(_POD_GROUP, "template"),
                    "workerGroupSpecs": {"type": "array", "items": WORKER_GROUP},
                },
                "headGroupSpec",
            ),
        },
        "serveConfigV2",
        "rayClusterConfig",
    ),
)
SCHEMAS: Mapping[str, Schema] = {
    "RayService": RAY_SERVICE,
    "ScaledObject": SCALED_OBJECT,
    "ServiceMonitor": SERVICE_MONITOR,
}


def validate(resource: Any, version: str) -> None:
    """Checks a resource of one of the kinds.

    Args:
        resource: as read from YAML.
        version: of Kubernetes, for what is its own.

    Raises:
        jsonschema.ValidationError: a field is missing, unknown or of the wrong type.
    """
    Draft202012Validator(SCHEMAS[resource["kind"]]).validate(resource)
    for own in _kubernetes_own(resource):
        kubernetes_validate.validate(own, version, strict=True)


def _kubernetes_own(resource: Any) -> Iterator[Any]:
    """Resources of Kubernetes' own kinds that hold what this one has of theirs."""
    metadata, spec = resource["metadata"], resource["spec"]
    yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
    cluster = spec.get("rayClusterConfig", {})
    for group in (*cluster.get("workerGroupSpecs", ()), *([cluster["headGroupSpec"]] if cluster else ())):
        labels = {"matchLabels": {"group": "any"}}
        pods = group["template"] | {"metadata": {"labels": labels["matchLabels"]}}
        deployment = {"selector": labels, "template": pods}
        yield {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": deployment}
    if "selector" in spec:
        yield {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "spec": {"selector": spec["selector"]}}
    behavior = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior")
    if behavior is not None:
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": spec["scaleTargetRef"]["name"]}
        scaling = {"scaleTargetRef": target, "maxReplicas": 1, "behavior": behavior}
        yield {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "spec": scaling}
