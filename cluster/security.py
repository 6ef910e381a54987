"""What the pods may do, what they are given, and whether all that they name is there."""

from collections.abc import Iterator

from cluster.manifests import Manifest, Pod, Problem, cluster_spec, groups, is_autoscaled, name_of, of_kind, pods

WEIGHTS = "t2v-weights"
_CONTAINER = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
_POD = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def check_security(manifests: list[Manifest], secrets: list[Manifest]) -> Iterator[Problem]:
    """All rules on pods and what they refer to. `secrets`: the example of those that an administrator makes."""
    known = {secret["metadata"]["name"]: set(secret["stringData"]) for secret in secrets}
    for manifest in manifests:
        where = name_of(manifest)
        for pod in pods(manifest):
            yield from _confined(f"{where} {pod.path}", pod)
            yield from _complete(f"{where} {pod.path}", pod, manifests)
        yield from _autoscaler(where, manifest)
        yield from _secrets(where, manifest, known)
    yield from _disruption(manifests)
    yield from _network(manifests)


def _confined(where: str, pod: Pod) -> Iterator[Problem]:
    context = pod.spec.get("securityContext", {})
    for key, wanted in _POD.items():
        if context.get(key) != wanted:
            yield Problem("confined", where, f"securityContext.{key} is {context.get(key)}: must be {wanted}")
    if not context.get("runAsUser"):
        yield Problem("confined", where, f"securityContext.runAsUser is {context.get('runAsUser')}: name one, not root")
    for container in pod.containers:
        name, own = container["name"], container.get("securityContext", {})
        for key, value in _CONTAINER.items():
            if own.get(key) != value:
                yield Problem("confined", where, f"securityContext.{key} of {name} is {own.get(key)}: must be {value}")
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        if tag in ("", "latest"):
            yield Problem("image", where, f"image {container['image']} of {name}: pods would differ; name a version")
    for container in pod.spec["containers"]:
        if "/tmp" not in {mount["mountPath"] for mount in container.get("volumeMounts", [])}:
            message = f"{container['name']} has no volume at /tmp: nothing else can be written; mount one"
            yield Problem("confined", where, message)


def _autoscaler(where: str, manifest: Manifest) -> Iterator[Problem]:
    """KubeRay adds its container to the head, as autoscalerOptions say."""
    cluster = cluster_spec(manifest)
    if cluster is None or not is_autoscaled(cluster):
        return
    own = cluster.get("autoscalerOptions", {}).get("securityContext", {})
    for key, value in _CONTAINER.items():
        if own.get(key) != value:
            message = f"autoscalerOptions.securityContext.{key} is {own.get(key)}: must be {value}"
            yield Problem("confined", where, message)


def _complete(where: str, pod: Pod, manifests: list[Manifest]) -> Iterator[Problem]:
    """Mounts name volumes, volumes name what is deployed, and the weights are written by their job alone."""
    claims = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "PersistentVolumeClaim")}
    maps = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "ConfigMap")}
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for volume in volumes.values():
        if (claim := volume.get("persistentVolumeClaim", {}).get("claimName")) and claim not in claims:
            yield Problem("reference", where, f"claim {claim}: no PersistentVolumeClaim of this name; add it")
        if (config := volume.get("configMap", {}).get("name")) and config not in maps:
            yield Problem("reference", where, f"config map {config}: none of this name; add it")
    for container in pod.containers:
        for source in container.get("envFrom", []):
            config = source.get("configMapRef", {"optional": True})
            if not config.get("optional") and config["name"] not in maps:
                yield Problem("reference", where, f"config map {config['name']}: none of this name; add it")
        for mount in container.get("volumeMounts", []):
            volume = volumes.get(mount["name"], {})
            if not volume:
                yield Problem("reference", where, f"mount {mount['name']}: no volume of this name; add it")
            is_weights = volume.get("persistentVolumeClaim", {}).get("claimName") == WEIGHTS
            if is_weights and not mount.get("readOnly") and pod.path != "template":
                yield Problem(
                    "weights", where, f"{mount['mountPath']} may be written: only the job does; readOnly: true"
                )


def _secrets(where: str, manifest: Manifest, known: dict[str, set[str]]) -> Iterator[Problem]:
    for name, key in _referenced(manifest):
        if name not in known:
            yield Problem("secret", where, f"secret {name} is not in examples/secrets.yaml: add it there")
        elif key is not None and key not in known[name]:
            yield Problem("secret", where, f"key {key} is not in secret {name} of examples/secrets.yaml: add it there")


def _referenced(part: object) -> Iterator[tuple[str, str | None]]:
    """All secrets that anything within names, with the key if it names one."""
    if isinstance(part, dict):
        for field, value in part.items():
            if field == "secretKeyRef":
                yield value["name"], value["key"]
            elif field in ("secretRef", "imagePullSecrets"):
                yield from ((entry["name"], None) for entry in (value if isinstance(value, list) else [value]))
            elif field == "secretName":
                yield value, "auth_token" if part.get("mode") == "token" else None
            else:
                yield from _referenced(value)
    elif isinstance(part, list):
        for entry in part:
            yield from _referenced(entry)


def _disruption(manifests: list[Manifest]) -> Iterator[Problem]:
    """A budget counts pods that are there. Their owner is no kind of Kubernetes' own, so it must be a whole number."""
    counts = [
        (group.pod, group.least)
        for manifest in manifests
        if (cluster := cluster_spec(manifest))
        for group in groups(cluster)
    ]
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        where, spec = name_of(budget), budget["spec"]
        least, labels = spec.get("minAvailable"), spec["selector"]["matchLabels"]
        there = sum(count for pod, count in counts if labels.items() <= pod.labels.items())
        if not isinstance(least, int):
            yield Problem(
                "disruption", where, "of Ray's pods Kubernetes knows no total: only minAvailable: NUMBER works"
            )
        elif least > there:
            yield Problem(
                "disruption", where, f"minAvailable {least}, of {there} pods: none could be drained; lower it"
            )


def _network(manifests: list[Manifest]) -> Iterator[Problem]:
    """Every pod is under a policy each way; what comes from elsewhere is named, with its ports."""
    policies = of_kind(manifests, "NetworkPolicy")
    for manifest in manifests if policies else []:
        for pod in pods(manifest):
            for direction in ("Ingress", "Egress"):
                covering = [p for p in policies if direction in p["spec"]["policyTypes"] and _selects(p, pod)]
                if not covering:
                    message = f"{pod.path} is under no NetworkPolicy for {direction}: label it part-of: t2v"
                    yield Problem("network", name_of(manifest), message)
    for policy in policies:
        ours = policy["spec"]["podSelector"]
        for rule in policy["spec"].get("ingress", []):
            sources = rule.get("from", [])
            if not sources:
                yield Problem("network", name_of(policy), "an ingress rule is open to everybody: say from whom")
            elif "ports" not in rule and sources != [{"podSelector": ours}]:
                yield Problem("network", name_of(policy), "an ingress rule from elsewhere opens all ports: name them")


def _selects(policy: Manifest, pod: Pod) -> bool:
    labels: dict[str, str] = policy["spec"]["podSelector"].get("matchLabels", {})
    return labels.items() <= pod.labels.items()
