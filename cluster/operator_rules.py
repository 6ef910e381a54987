"""What KubeRay's operator refuses although its schema allows it, and what we want of a cluster of ours.

The operator's rules are those of KubeRay v1.7.0, ray-operator/controllers/ray/utils/validation.go.
"""

import re
from collections.abc import Iterator

from cluster.manifests import Manifest, Problem, cluster_spec, groups, is_autoscaled, name_of, of_kind

RAY_KINDS = ("RayService", "RayCluster", "RayJob")
UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
_TIMEOUT = "ray.io/initializing-timeout"
_LONG_S = 30 * 60
_LONGEST_NAME = {"RayService": 47, "RayJob": 47, "RayCluster": 53}
_MANAGED = (
    "RAY_gcs_storage",
    "RAY_gcs_storage_path",
    "RAY_REDIS_ADDRESS",
    "REDIS_PASSWORD",
    "RAY_enable_autoscaler_v2",
)
_GATED = {"networkPolicy": "RayClusterNetworkPolicy", "tlsOptions": "RayClusterMTLS", "historyServerOptions": "alpha"}
_UNITS = {"s": 1, "m": 60, "h": 3600}


def check_operator(manifests: list[Manifest], ray_version: str) -> Iterator[Problem]:
    """All rules on Ray clusters. `ray_version`: the one in the image."""
    for manifest in of_kind(manifests, *RAY_KINDS):
        where, name = name_of(manifest), manifest["metadata"]["name"]
        longest = _LONGEST_NAME[manifest["kind"]]
        if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield Problem("name", where, f"must be a DNS label of at most {longest} characters, from a letter on")
        if manifest["kind"] == "RayService":
            yield from _service(where, manifest)
        if (cluster := cluster_spec(manifest)) is not None:
            yield from _cluster(where, cluster, ray_version)
            yield from _fault_tolerance(where, cluster)


def _service(where: str, manifest: Manifest) -> Iterator[Problem]:
    spec, cluster = manifest["spec"], manifest["spec"]["rayClusterConfig"]
    upgrade = spec.get("upgradeStrategy", {}).get("type", "NewCluster")
    kinds = groups(cluster)
    if upgrade not in UPGRADES:
        yield Problem("upgrade", where, f"upgradeStrategy.type {upgrade}: must be one of {', '.join(UPGRADES)}")
    elif upgrade != "None" and any(kind.gpus for kind in kinds):
        message = f"upgradeStrategy.type {upgrade} starts a second cluster, for which there are no GPUs; write None"
        yield Problem("upgrade", where, message)
    if "upgradeStrategy" in cluster:
        yield Problem(
            "upgrade", where, "rayClusterConfig.upgradeStrategy: only a RayCluster of its own has it; remove it"
        )
    timeout = manifest["metadata"].get("annotations", {}).get(_TIMEOUT, "")
    parts = re.findall(r"(\d+)([smh])", timeout)
    seconds = sum(int(number) * _UNITS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != timeout or seconds < _LONG_S:
        message = f"{_TIMEOUT} {timeout!r}: must be a duration of 30m or more; nodes and weights are slow to come"
        yield Problem("initialising", where, message)
    if len(kinds) > 1 and not spec.get("excludeHeadPodFromServeSvc"):
        yield Problem("head", where, "excludeHeadPodFromServeSvc must be true: the head has no replicas to answer with")


def _cluster(where: str, cluster: Manifest, ray_version: str) -> Iterator[Problem]:
    kinds = groups(cluster)
    if cluster.get("rayVersion") != ray_version:
        message = (
            f"rayVersion {cluster.get('rayVersion')}: the image has {ray_version} (.ci/constraints.txt); write that"
        )
        yield Problem("ray version", where, message)
    auth = cluster.get("authOptions", {})
    if auth.get("mode") != "token":
        yield Problem("token", where, "authOptions.mode must be token: without, whoever reaches Ray's ports runs code")
    if auth.get("enableK8sTokenAuth"):
        yield Problem("token", where, "authOptions.enableK8sTokenAuth: a RayService cannot; remove it")
    if len(kinds) > 1 and kinds[0].cpus:
        message = f'the head has {kinds[0].cpus:g} CPUs, and would get replicas; rayStartParams: {{num-cpus: "0"}}'
        yield Problem("head", where, message)
    for field, gate in _GATED.items():
        if field in cluster:
            yield Problem("feature gate", where, f"{field} needs the operator's alpha feature {gate}; remove it")
    parts = [("head", cluster["headGroupSpec"]), *((w["groupName"], w) for w in cluster.get("workerGroupSpecs", []))]
    autoscaler = cluster.get("autoscalerOptions", {}).get("version")
    if is_autoscaled(cluster) and autoscaler != "v2":
        yield Problem("autoscaler", where, f"autoscalerOptions.version {autoscaler}: must be v2")
    for name, part in parts:
        params = part.get("rayStartParams", {})
        if part.get("resources") and params.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield Problem("resources", where, f"{name} has both resources and rayStartParams of them: keep one")
        if "labels" in params:
            yield Problem("resources", where, f"{name}: rayStartParams.labels is not supported; use labels")
        if not is_autoscaled(cluster) and (part.get("priority") or "idleTimeoutSeconds" in part):
            yield Problem(
                "autoscaler", where, f"{name}: priority and idleTimeoutSeconds need the autoscaler; remove them"
            )
        if is_autoscaled(cluster) and part["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield Problem("autoscaler", where, f"{name}: restartPolicy must be Never or left out with autoscaler v2")
        if part.get("minReplicas", 0) > part.get("maxReplicas", 1 << 31):
            yield Problem("resources", where, f"{name}: minReplicas is more than maxReplicas; lower the first")
    for kind in kinds:
        for variable in sorted(kind.environment.keys() & set(_MANAGED)):
            message = f"{variable} of {kind.name}: KubeRay sets it; use gcsFaultToleranceOptions or autoscalerOptions"
            yield Problem("managed", where, message)


def _fault_tolerance(where: str, cluster: Manifest) -> Iterator[Problem]:
    options = cluster.get("gcsFaultToleranceOptions")
    if options is None:
        if len(groups(cluster)) > 1:
            message = (
                "gcsFaultToleranceOptions is missing: a head that dies takes the nodes along; add a component gcs-*"
            )
            yield Problem("fault tolerance", where, message)
        return
    redis = {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"} & options.keys()
    if options.get("backend") == "rocksdb":
        if redis:
            yield Problem("fault tolerance", where, f"{', '.join(sorted(redis))} is not for rocksdb: remove it")
        if "storage" not in options:
            yield Problem("fault tolerance", where, "rocksdb needs storage: a size, or a claimName")
    else:
        if "storage" in options:
            yield Problem("fault tolerance", where, "storage is not for redis: remove it")
        if not options.get("redisAddress"):
            yield Problem("fault tolerance", where, "redis needs redisAddress")
