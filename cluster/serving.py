"""Does the service suit its cluster? The Serve configuration beside the ports, the files and the patience around it."""

from collections.abc import Iterator
from dataclasses import dataclass

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.manifests import Group, Manifest, Problem, cluster_spec, groups, name_of, of_kind, pods
from cluster.placement import check_placement
from serve_app.config import AppConfig

IMPORT_PATH = "serve_app.app:build"
# HAProxy's own ports beside the service's, by the variables that move them (open on all interfaces).
HAPROXY_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
}
_HAPROXY, _HARD_STOP = "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
_SERVER_TIMEOUT, _DRAINING = "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"
_THROUGHPUT = "RAY_SERVE_THROUGHPUT_OPTIMIZED"
_HARD_STOP_S, _DRAINING_S = 120.0, 30.0  # Ray's defaults
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_DRAIN_S, _GRACE_S = 30.0, 30.0  # Ray's default, and Kubernetes'
_READ_TIMEOUT = "nginx.ingress.kubernetes.io/proxy-read-timeout"


@dataclass(frozen=True, slots=True)
class Served:
    """A Serve configuration and the Ray cluster that it is for."""

    where: str
    raw: Manifest
    app: AppConfig
    groups: list[Group]

    @property
    def http_options(self) -> Manifest:
        """As they are written: what is left out is Ray's default, and not here."""
        options: Manifest = self.raw.get("http_options", {})
        return options

    def problem(self, rule: str, message: str) -> Problem:
        return Problem(rule, self.where, message)


def check_serving(manifests: list[Manifest], secrets: list[Manifest]) -> Iterator[Problem]:
    """All rules on what is served, of each configuration that can be read at all. `secrets`: the example of them."""
    known = {secret["metadata"]["name"]: set(secret["stringData"]) for secret in secrets}
    for where, text, cluster in _configs(manifests):
        try:
            raw = yaml.safe_load(text)
            (application,) = ServeDeploySchema.model_validate(raw).applications
            served = Served(where, raw, AppConfig.model_validate(application.args), groups(cluster))
        except (ValidationError, ValueError, yaml.YAMLError) as error:
            yield Problem("serve config", where, f"Ray or serve_app.config refuses it: {error}")
            continue
        if application.import_path != IMPORT_PATH:
            yield served.problem("serve config", f"import_path {application.import_path}: must be {IMPORT_PATH}")
        yield from check_placement(where, served.app, served.groups)
        for check in (_shares_nothing, _is_patient, _has_notice, _haproxy, _ports):
            yield from check(served)
        yield from _has_files(served, known)
        yield from _waits_for_weights(served, manifests)
        yield from _behind_ingress(served, manifests)


def _configs(manifests: list[Manifest]) -> Iterator[tuple[str, str, Manifest]]:
    """A RayService has its own; a plain cluster's is in a ConfigMap, which a job deploys."""
    for manifest in of_kind(manifests, "RayService", "RayCluster"):
        cluster = cluster_spec(manifest)
        assert cluster is not None
        if manifest["kind"] == "RayService":
            yield name_of(manifest), manifest["spec"].get("serveConfigV2", ""), cluster
            continue
        for config in of_kind(manifests, "ConfigMap"):
            if text := config["data"].get("serve-config.yaml"):
                yield name_of(config), text, cluster


def _shares_nothing(served: Served) -> Iterator[Problem]:
    """Nodes have no file system in common but for the weights."""
    nodes = sum(group.most for group in served.groups if group.cpus or group.gpus)
    storage = served.app.storage
    if nodes > 1 and storage.database.startswith("sqlite"):
        yield served.problem("SQLite", f"{storage.database}: a file cannot serve {nodes} nodes; use postgresql://")
    if nodes > 1 and "://" not in storage.artifacts:
        yield served.problem("artifacts", f"{storage.artifacts}: a folder cannot serve {nodes} nodes; use s3://")


def _is_patient(served: Served) -> Iterator[Problem]:
    """Whatever ends a request waits for the longest generation."""
    longest = served.app.longest_generation_s
    patience: dict[str, float] = {}
    for application in served.raw["applications"]:
        for deployment in application.get("deployments", []):
            if (seconds := deployment.get("graceful_shutdown_timeout_s")) is not None:
                patience[f"graceful_shutdown_timeout_s of {deployment['name']}"] = seconds
    if (seconds := served.raw.get("http_options", {}).get("request_timeout_s")) is not None:
        patience["http_options.request_timeout_s"] = seconds
    for group in served.groups:
        if group.environment.get(_HAPROXY) == "1":
            patience[f"{_HARD_STOP} of {group.name}"] = float(group.environment.get(_HARD_STOP, _HARD_STOP_S))
        if seconds := group.environment.get(_SERVER_TIMEOUT):
            patience[f"{_SERVER_TIMEOUT} of {group.name}"] = float(seconds)
    for name, seconds in patience.items():
        if seconds < longest:
            message = (
                f"{name} is {seconds:g} s, and a generation may take longest_generation_s, {longest:g} s: raise it"
            )
            yield served.problem("graceful shutdown", message)


def _has_notice(served: Served) -> Iterator[Problem]:
    """A pod that is told to end drains its Ray node before it is killed, and denoisers hand over before that ends."""
    app = served.app
    for group in served.groups:
        drain_s = float(group.environment.get(_DRAIN, _DRAIN_S))
        grace_s = float(group.pod.spec.get("terminationGracePeriodSeconds", _GRACE_S))
        if grace_s <= drain_s:
            message = (
                f"terminationGracePeriodSeconds of {group.name} is {grace_s:g} s, and Ray drains the node for {_DRAIN},"
                f" {drain_s:g} s: Kubernetes kills it before that is over; raise the first or lower the second"
            )
            yield served.problem("notice", message)
        denoises = group.gpus if app.denoiser.num_gpus else group.cpus
        if group.name != "head" and denoises and drain_s <= app.denoiser.hand_back_s:
            message = (
                f"{_DRAIN} of {group.name} is {drain_s:g} s, and denoiser.hand_back_s {app.denoiser.hand_back_s:g} s:"
                " videos are handed over so long before the drain ends; raise the first or lower the second"
            )
            yield served.problem("notice", message)


def _haproxy(served: Served) -> Iterator[Problem]:
    """HAProxy is on everywhere or nowhere, takes messages of any size, and has time to drain."""
    workers = any(group.name != "head" for group in served.groups)
    settings = {group.name: group.environment.get(_HAPROXY, "0") for group in served.groups}
    if len(set(settings.values())) > 1:
        yield served.problem("HAProxy", f"{_HAPROXY} is {settings}: set it alike for the head and all groups")
    for group in served.groups:
        if group.environment.get(_THROUGHPUT) == "1":
            message = f"{_THROUGHPUT}=1 of {group.name} caps messages at 4 MiB, and videos are larger: leave it out"
            yield served.problem("HAProxy", message)
        draining = float(group.environment.get(_DRAINING, _DRAINING_S))
        if workers and draining < _DRAINING_S:
            message = (
                f"{_DRAINING} of {group.name} is {draining:g} s: balancers still send requests; {_DRAINING_S:g} or more"
            )
            yield served.problem("HAProxy", message)


def _ports(served: Served) -> Iterator[Problem]:
    """Serve listens where Kubernetes sends, and HAProxy's other ports are nobody's."""
    options = served.http_options
    host, port, exposed = options.get("host"), options.get("port", 8000), "RayService" in served.where
    if host is None or (exposed and host != "0.0.0.0"):
        rule = (
            "must be 0.0.0.0, where pods reach it" if exposed else "must be stated: Ray's default changes with HAProxy"
        )
        yield served.problem("host", f"http_options.host {host}: {rule}")
    for group in served.groups:
        named = {entry["name"]: entry["containerPort"] for entry in group.ray.get("ports", [])}
        if named.get("serve") != port:
            message = (
                f"port `serve` of {group.name} is {named.get('serve')}, and Serve listens on {port}: make them equal"
            )
            yield served.problem("port", message)
        taken = {int(group.environment.get(name, default)) for name, default in HAPROXY_PORTS.items()}
        for name in named:
            if named[name] in taken:
                message = (
                    f"port `{name}` of {group.name}, {named[name]}, is HAProxy's own: it must not be reached; remove it"
                )
                yield served.problem("port", message)


def _has_files(served: Served, secrets: dict[str, set[str]]) -> Iterator[Problem]:
    """What the configuration names is mounted wherever it is read, and where that is a secret, it is in there."""
    for group in served.groups:
        volumes = {volume["name"]: volume for volume in group.pod.spec.get("volumes", [])}
        mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in group.ray.get("volumeMounts", [])}
        for path in _read_by(served.app, group):
            above = [mount for mount in mounts if path.startswith(f"{mount}/")]
            if not above:
                message = f"{path} is under no mount of {group.name}, {sorted(mounts)}: mount its volume"
                yield served.problem("files", message)
                continue
            mount = max(above, key=len)
            secret, key = mounts[mount].get("secret", {}).get("secretName"), path.removeprefix(f"{mount}/")
            if secret in secrets and key not in secrets[secret]:
                message = (
                    f"{path}: secret {secret} of examples/secrets.yaml, mounted at {mount}, lacks key {key}; add it"
                )
                yield served.problem("files", message)


def _read_by(app: AppConfig, group: Group) -> Iterator[str]:
    """The files that the service reads on nodes of a group."""
    if app.model.startswith("/") and (group.cpus or group.gpus):
        yield app.model
    if app.keys.file and group.cpus:  # by the Ingress deployment
        yield str(app.keys.file)
    if app.webhooks.secret_file:  # by serve_app.app:build, a task of no CPUs, which Ray runs on any node, the head too
        yield str(app.webhooks.secret_file)


def _waits_for_weights(served: Served, manifests: list[Manifest]) -> Iterator[Problem]:
    """The job fills the folder that is served, and nodes wait for it: Serve gives up what fails three times."""
    model = served.app.model
    if not model.startswith("/"):
        return
    targets = {
        entry["value"]
        for job in of_kind(manifests, "Job")
        for pod in pods(job)
        for container in pod.containers
        for entry in container.get("env", [])
        if entry["name"] == "TARGET"
    }
    if targets != {model}:
        yield served.problem("weights", f"model is {model}, and the job fills {sorted(targets)}: make them equal")
    for group in served.groups:
        commands = " ".join(" ".join(c.get("command", [])) for c in group.pod.spec.get("initContainers", []))
        if (group.cpus or group.gpus) and f"{model}/" not in commands:
            yield served.problem("weights", f"no initContainer of {group.name} waits for {model}: name it there")


def _behind_ingress(served: Served, manifests: list[Manifest]) -> Iterator[Problem]:
    """An Ingress leads to the service that KubeRay makes, and waits as long as a generation takes."""
    for ingress in of_kind(manifests, "Ingress"):
        if served.app.keys.file is None and served.app.keys.keys is None:
            yield served.problem("ingress", "keys: the Ingress lets everybody in; name a file of keys")
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                there = service["name"], service["port"]["number"]
                wanted = f"{served.where.removeprefix('RayService ')}-serve-svc", served.http_options.get("port", 8000)
                if there != wanted:
                    yield Problem("ingress", name_of(ingress), f"leads to {there}: must be KubeRay's {wanted}")
        timeout = float(ingress["metadata"].get("annotations", {}).get(_READ_TIMEOUT, 60))
        if timeout < served.app.longest_generation_s:
            message = f"{_READ_TIMEOUT} is {timeout:g} s: raise it above {served.app.longest_generation_s:g} s"
            yield Problem("graceful shutdown", name_of(ingress), message)
