"""Are the manifests what Kubernetes and KubeRay accept? A field that they do not know is an error here.

The definitions of KubeRay's kinds are not part of this project: `crds` reads them from a folder of KubeRay's release.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.manifests import Manifest, Problem, name_of

KUBERNETES = "1.33"
KINDS = ("rayclusters", "rayjobs", "rayservices")

Schema = dict[str, Any]  # JSON schema
Crds = dict[tuple[str, str], Schema]

Labels = dict[str, str]
Duration = Annotated[str, Field(pattern=r"^\d+(s|m|h)$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Relabeling(_Strict):
    sourceLabels: list[str]
    targetLabel: str


class _Endpoint(_Strict):
    port: str
    interval: Duration
    relabelings: list[_Relabeling] = []


class _Selector(_Strict):
    matchLabels: Labels


class _Monitored(_Strict):
    selector: _Selector
    podMetricsEndpoints: list[_Endpoint]


class _Metadata(_Strict):
    name: str
    namespace: str
    labels: Labels


class _Alert(_Strict):
    alert: str
    expr: str
    for_: Duration | None = Field(default=None, alias="for")
    labels: dict[Literal["severity"], Literal["warning", "critical"]]
    annotations: dict[Literal["summary"], str]


class _AlertGroup(_Strict):
    name: str
    rules: list[_Alert]


class _Alerts(_Strict):
    groups: list[_AlertGroup]


class PodMonitor(_Strict):
    """What we use of the prometheus-operator's kind; its own definition knows more."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: _Metadata
    spec: _Monitored


class PrometheusRule(_Strict):
    """Likewise."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: _Metadata
    spec: _Alerts


_MONITORING: dict[str, type[BaseModel]] = {"PodMonitor": PodMonitor, "PrometheusRule": PrometheusRule}


def crds(folder: Path) -> Crds:
    """The schemas of KubeRay's kinds, by apiVersion and kind. Raises FileNotFoundError where one is missing."""
    schemas: Crds = {}
    for plural in KINDS:
        with (folder / f"ray.io_{plural}.yaml").open(encoding="utf-8") as file:
            definition = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in definition["versions"]:
            key = f"{definition['group']}/{version['name']}", definition["names"]["kind"]
            if version["storage"]:
                schemas[key] = _closed(version["schema"]["openAPIV3Schema"])
    return schemas


def check_schema(manifest: Manifest, known: Crds) -> Iterator[Problem]:
    """By the schema of its kind. KubeRay's kinds need `known`."""
    where, key = name_of(manifest), (manifest["apiVersion"], manifest["kind"])
    if model := _MONITORING.get(manifest["kind"]):
        try:
            model.model_validate(manifest)
        except ValidationError as error:
            for detail in error.errors():
                yield Problem("schema", where, f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}")
    elif key in known:
        for found in Draft202012Validator(known[key]).iter_errors(manifest):
            yield Problem("schema", where, f"{found.json_path.removeprefix('$.')}: {found.message}")
    else:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as refused:
            yield Problem("schema", where, f"{'.'.join(map(str, refused.path))}: {refused.message}")
        except kubernetes_validate.SchemaNotFoundError:
            message = f"{' '.join(key)}: neither Kubernetes {KUBERNETES} nor KubeRay has it; correct apiVersion or kind"
            yield Problem("schema", where, message)


def _closed(schema: Schema) -> Schema:
    """The same as JSON schema that refuses unknown fields, as `kubectl apply --validate=strict` does."""
    closed = copy.deepcopy(schema)
    _close(closed)
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    fields = {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": texts, "annotations": texts}
    closed["properties"]["metadata"] = {"properties": fields, "required": ["name"], "additionalProperties": False}
    return closed


def _close(schema: Schema) -> None:
    if schema.pop("x-kubernetes-int-or-string", False):
        schema["type"] = ["integer", "string"]
    properties = schema.get("properties", {})
    if properties and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    # Kubernetes fills defaults in before it asks what is missing.
    schema["required"] = [name for name in schema.get("required", []) if "default" not in properties.get(name, {})]
    below = [*properties.values(), schema.get("items"), schema.get("additionalProperties")]
    for part in (*below, *(part for word in ("anyOf", "allOf", "oneOf") for part in schema.get(word, []))):
        if isinstance(part, dict):
            _close(part)
