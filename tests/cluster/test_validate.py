"""What is deployed is valid, and each rule finds what breaks it."""

import ast
import copy
import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import yaml
from ray._common.utils import import_attr

from cluster.manifests import CannotRender, Problem, groups, quantity, render
from cluster.render import KUBERAY
from cluster.validate import FOLDERS, ROOT, Tree, check_rules, check_schemas
from serve_app.metrics import METRICS
from serve_app.tracing import otlp

ONE, POOL, DEV, CALLER = FOLDERS
GONE = object()
CLUSTER = "spec.rayClusterConfig"
HEAD = f"{CLUSTER}.headGroupSpec"
CPU, GPU, SPOT = (f"{CLUSTER}.workerGroupSpecs.{number}" for number in range(3))
RAY = "template.spec.containers.0"
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@dataclass(frozen=True)
class Break:
    """One value that is changed, the rule that must see it, and words of what it says. `serve` is of serveConfigV2."""

    rule: str
    words: str
    path: str
    value: Any
    tree: str = POOL
    where: str = "RayService t2v"
    serve: bool = False


def served(rule: str, words: str, path: str, value: Any, tree: str = POOL) -> Break:
    return Break(rule, words, path, value, tree, serve=True)


ENV = [
    {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"},
    {"name": "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "value": "660"},
]


def env(name: str, value: str) -> list[dict[str, str]]:
    return [entry for entry in ENV if entry["name"] != name] + [{"name": name, "value": value}]


def policy(name: str, path: str, value: Any) -> Break:
    return Break("network", "ingress rule", path, value, where=f"NetworkPolicy {name}")


BREAKS = [
    # The Serve configuration, and whether it fits
    served("serve config", "max_ongonig", "applications.0.args.denoiser.max_ongonig", 3),
    Break("serve config", "refuses it", "spec.serveConfigV2", "applications: [t2v"),
    served("serve config", "proxy_location", "proxy_location", "Everywhere"),
    served("serve config", "must be serve_app.app:build", "applications.0.import_path", "serve_app.app:buidl"),
    served("fit", "denoiser", "applications.0.args.denoiser.max_replicas", 13),
    served("fit", "text_encoder", "applications.0.args.text_encoder.max_replicas", 9),
    served("fit", "decoder", "applications.0.args.decoder.num_gpus", 0.5, ONE),
    served("fit", "min", "applications.0.args.denoiser.min_replicas", 1),
    served("fit", "decoder", "applications.0.args.decoder.resources", {"t2v_disk": 1}),
    Break("fit", "raise maxReplicas", f"{SPOT}.maxReplicas", 3),
    Break("fit", "raise minReplicas", f"{CPU}.minReplicas", 0),
    served("fit", "decoder", "applications.0.args.decoder.max_replicas", 13),
    served("fit", "generator", "applications.0.args.generator.label_selector", {"pool": "gpu"}),
    served("fit", "ingress", "applications.0.args.ingress.label_selector", {"pool": "!in(cpu, gpu)"}),
    Break("fit", "label a group", f"{CPU}.labels", {}),
    served("rollout", "beside the old ones", "applications.0.args.text_encoder.num_cpus", 4, ONE),
    served("placement", "generator has num_cpus 0", "applications.0.args.generator.num_cpus", 0, ONE),
    Break("GPU nodes", 'CPU: "0"', f"{GPU}.resources.CPU", "4"),
    served("SQLite", "use postgresql", "applications.0.args.storage.database", "sqlite:////var/lib/t2v/t2v.db"),
    served("artifacts", "use s3", "applications.0.args.storage.artifacts", "/var/lib/t2v/store"),
    # Patience
    served("graceful shutdown", "longest_generation_s, 700", "applications.0.args.longest_generation_s", 700),
    served(
        "graceful shutdown",
        "of Denoiser is 20 s",
        "applications.0.deployments",
        [{"name": "Denoiser", "graceful_shutdown_timeout_s": 20}],
    ),
    served("graceful shutdown", "request_timeout_s", "http_options.request_timeout_s", 60),
    Break("graceful shutdown", "of gpu is 120 s", f"{GPU}.{RAY}.env", ENV[:1]),
    Break(
        "graceful shutdown", "TIMEOUT_SERVER_S", f"{HEAD}.{RAY}.env", env("RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S", "60")
    ),
    Break(
        "graceful shutdown",
        "proxy-read-timeout is 60 s",
        "metadata.annotations",
        {},
        where="Ingress t2v",
    ),
    # Nodes that are told to go
    Break("notice", "of gpu is 45 s, and Ray", f"{GPU}.template.spec.terminationGracePeriodSeconds", 45),
    Break("notice", "of cpu is 30 s, and Ray", f"{CPU}.template.spec.terminationGracePeriodSeconds", GONE),
    Break("notice", "of gpu-spot is 15 s, and Ray", f"{SPOT}.{RAY}.env", ENV),
    Break("notice", "of head is 30 s, and Ray", f"{HEAD}.{RAY}.env", ENV),
    Break("notice", "of gpu-spot is 10 s, and denoiser", f"{SPOT}.{RAY}.env", env(DRAIN, "10")),
    Break("notice", "of gpu is 0 s, and denoiser", f"{GPU}.{RAY}.env", env(DRAIN, "0"), ONE),
    served("notice", "of gpu-spot is 12 s, and denoiser", "applications.0.args.denoiser.hand_back_s", 12),
    # HAProxy and ports
    Break("HAProxy", "set it alike", f"{CPU}.{RAY}.env", []),
    Break("HAProxy", "4 MiB", f"{CPU}.{RAY}.env", env("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")),
    Break("HAProxy", "30 or more", f"{CPU}.{RAY}.env", env("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")),
    served("host", "must be 0.0.0.0", "http_options.host", "127.0.0.1"),
    served("host", "must be 0.0.0.0", "http_options.host", GONE),
    served("port", "Serve listens on 8500", "http_options.port", 8500),
    Break("port", "HAProxy's own", f"{CPU}.{RAY}.ports.1.containerPort", 9101),
    Break("port", "HAProxy's own", f"{CPU}.{RAY}.ports.1.containerPort", 8404),
    Break("port", "`serve` of head is None", f"{HEAD}.{RAY}.ports.0.name", "http"),
    Break(
        "ingress",
        "t2v-serve-svc",
        "spec.rules.0.http.paths.0.backend.service.name",
        "t2v-head-svc",
        where="Ingress t2v",
    ),
    served("ingress", "lets everybody in", "applications.0.args.keys", {}),
    # Files
    served("files", "/weights/ms is under no mount of gpu", "applications.0.args.model", "/weights/ms"),
    served("files", "/etc/keys is under no mount of cpu", "applications.0.args.keys.file", "/etc/keys"),
    served("files", "under no mount of head", "applications.0.args.webhooks.secret_file", "/etc/hooks/secret"),
    Break("files", "/etc/t2v/webhooks/secret is under no mount of head", f"{HEAD}.{RAY}.volumeMounts.1", GONE),
    Break("files", "is under no mount of gpu-spot", f"{SPOT}.{RAY}.volumeMounts.2", GONE),
    served("files", "lacks key secert", "applications.0.args.webhooks.secret_file", "/etc/t2v/webhooks/secert"),
    served("files", "lacks key kyes", "applications.0.args.keys.file", "/etc/t2v/keys/kyes", ONE),
    served("weights", "make them equal", "applications.0.args.model", "/models/zeroscope"),
    Break("weights", "of gpu waits", f"{GPU}.template.spec.initContainers", GONE),
    # KubeRay's own rules
    Break("name", "DNS label", "metadata.name", "T2V", CALLER, "RayCluster t2v-shared"),
    Break("upgrade", "no GPUs", "spec.upgradeStrategy.type", "NewCluster"),
    Break("upgrade", "no GPUs", "spec.upgradeStrategy", GONE),
    Break("upgrade", "must be one of", "spec.upgradeStrategy.type", "Rolling", DEV),
    Break("upgrade", "RayCluster of its own", f"{CLUSTER}.upgradeStrategy", {"type": "Recreate"}),
    Break("initialising", "30m or more", "metadata.annotations", {"ray.io/initializing-timeout": "10m"}),
    Break("initialising", "a duration", "metadata.annotations", {"ray.io/initializing-timeout": "2 hours"}),
    Break("head", "excludeHeadPodFromServeSvc", "spec.excludeHeadPodFromServeSvc", False),
    Break("head", 'num-cpus: "0"', f"{HEAD}.rayStartParams", {}),
    Break("ray version", "the image has", f"{CLUSTER}.rayVersion", "2.59.0"),
    Break("token", "runs code", f"{CLUSTER}.authOptions.mode", "disabled"),
    Break("token", "cannot", f"{CLUSTER}.authOptions.enableK8sTokenAuth", True),
    Break("feature gate", "RayClusterMTLS", f"{CLUSTER}.tlsOptions", {"enabled": True}),
    Break("autoscaler", "must be v2", f"{CLUSTER}.autoscalerOptions.version", "v1"),
    Break("autoscaler", "need the autoscaler", f"{GPU}.priority", 1, ONE),
    Break("autoscaler", "restartPolicy", f"{GPU}.template.spec.restartPolicy", "Always"),
    Break("resources", "keep one", f"{GPU}.rayStartParams", {"num-gpus": "1"}),
    Break("resources", "use labels", f"{GPU}.rayStartParams", {"labels": "a=b"}),
    Break("resources", "lower the first", f"{GPU}.minReplicas", 5),
    Break("managed", "KubeRay sets it", f"{HEAD}.{RAY}.env", [*ENV, {"name": "RAY_gcs_storage", "value": "rocksdb"}]),
    Break("fault tolerance", "add a component", f"{CLUSTER}.gcsFaultToleranceOptions", GONE),
    Break("fault tolerance", "not for redis", f"{CLUSTER}.gcsFaultToleranceOptions.storage", {"size": "1Gi"}),
    Break("fault tolerance", "needs redisAddress", f"{CLUSTER}.gcsFaultToleranceOptions.redisAddress", GONE),
    Break("fault tolerance", "not for rocksdb", f"{CLUSTER}.gcsFaultToleranceOptions.redisAddress", "redis:6379", ONE),
    Break("fault tolerance", "needs storage", f"{CLUSTER}.gcsFaultToleranceOptions.storage", GONE, ONE),
    # Pods
    Break("confined", "runAsNonRoot is False", f"{GPU}.template.spec.securityContext.runAsNonRoot", False),
    Break("confined", "not root", f"{GPU}.template.spec.securityContext.runAsUser", 0),
    Break("confined", "seccompProfile", f"{HEAD}.template.spec.securityContext.seccompProfile", GONE),
    Break("confined", "readOnlyRootFilesystem", f"{HEAD}.{RAY}.securityContext.readOnlyRootFilesystem", False),
    Break("confined", "capabilities", "spec.template.spec.containers.0.securityContext", {}, where="Job t2v-weights"),
    Break("confined", "of weights is None", f"{CPU}.template.spec.initContainers.0.securityContext", {}),
    Break("confined", "no volume at /tmp", f"{HEAD}.{RAY}.volumeMounts", []),
    Break("confined", "autoscalerOptions", f"{CLUSTER}.autoscalerOptions.securityContext", GONE),
    Break("image", "name a version", f"{GPU}.{RAY}.image", "t2v-serve"),
    Break("image", "name a version", f"{GPU}.{RAY}.image", "registry:5000/t2v-serve:latest"),
    Break(
        "reference",
        "claim t2v-wieghts",
        f"{GPU}.template.spec.volumes.1.persistentVolumeClaim.claimName",
        "t2v-wieghts",
    ),
    Break("reference", "no volume", f"{GPU}.{RAY}.volumeMounts.1.name", "wieghts"),
    Break(
        "reference",
        "config map t2v-shraed",
        "spec.headGroupSpec.template.spec.volumes.1.configMap.name",
        "t2v-shraed",
        CALLER,
        "RayCluster t2v-shared",
    ),
    Break("reference", "config map t2v-tracing", f"{GPU}.{RAY}.envFrom.0.configMapRef.optional", False),
    Break("weights", "only the job does", f"{GPU}.{RAY}.volumeMounts.1.readOnly", False),
    Break("secret", "t2v-postgers", f"{CPU}.{RAY}.envFrom.0.secretRef.name", "t2v-postgers"),
    Break(
        "secret", "key passwd", f"{CLUSTER}.gcsFaultToleranceOptions.redisPassword.valueFrom.secretKeyRef.key", "passwd"
    ),
    Break("secret", "t2v-tokne", f"{CLUSTER}.authOptions.secretName", "t2v-tokne"),
    Break("secret", "key auth_token", f"{CLUSTER}.authOptions.secretName", "t2v-s3"),
    Break("secret", "t2v-kyes", f"{CPU}.template.spec.volumes.2.secret.secretName", "t2v-kyes"),
    Break("secret", "t2v-cert", "spec.tls.0.secretName", "t2v-cert", where="Ingress t2v"),
    Break("disruption", "only minAvailable", "spec.minAvailable", "50%", where="PodDisruptionBudget t2v-cpu"),
    Break("disruption", "of 2 pods", "spec.minAvailable", 3, where="PodDisruptionBudget t2v-cpu"),
    Break("network", "under no NetworkPolicy", f"{GPU}.template.metadata.labels", {}),
    policy("t2v-metrics", "spec.ingress.0.from", GONE),
    policy("t2v-http", "spec.ingress.0.ports", GONE),
    # Monitoring
    Break("query", "cannot read it", "spec.groups.0.rules.0.expr", "absent(", where="PrometheusRule t2v"),
    Break("metric", "t2v_steps", "spec.groups.0.rules.4.expr", "rate(t2v_steps_total[5m])", where="PrometheusRule t2v"),
    Break(
        "metric",
        "ray_t2v_stage_seconds:",
        "spec.groups.0.rules.0.expr",
        "ray_t2v_stage_seconds > 1",
        where="PrometheusRule t2v",
    ),
    Break("metric", "no label job", "spec.groups.0.rules.0.expr", 'ray_t2v_jobs{job="x"}', where="PrometheusRule t2v"),
    Break(
        "metric",
        "no label modle",
        "spec.groups.0.rules.0.expr",
        "sum by (modle) (ray_t2v_jobs) > 1",
        where="PrometheusRule t2v",
    ),
    Break("guide", "say what to do", "spec.groups.0.rules.0.alert", "T2vUnheardOf", where="PrometheusRule t2v"),
    Break("scrape", "does not select", "spec.selector.matchLabels.app", "x", where="PodMonitor t2v"),
    Break("scrape", "metrisc", "spec.podMetricsEndpoints.0.port", "metrisc", where="PodMonitor t2v"),
]


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_deployed_is_valid(name, trees, known):
    assert [*map(str, check_schemas(trees[name], known))] == []


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_deployed_keeps_all_rules(name, trees):
    assert [*map(str, check_rules(trees[name]))] == []


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: f"{broken.rule}: {broken.words}")
def test_a_broken_value_is_found_by_its_rule(broken, trees):
    found = [*check_rules(changed(trees[broken.tree], broken))]
    assert any(problem.rule == broken.rule and broken.words in problem.message for problem in found), found


def test_every_rule_has_been_broken():
    rules = {"schema"}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", getattr(node.func, "attr", "")).lower() == "problem"
            ):
                rules |= {part.value for part in node.args[:1] if isinstance(part, ast.Constant)}
    assert rules == {"schema", *(broken.rule for broken in BREAKS)}


@pytest.mark.parametrize(
    ("where", "path", "value", "words"),
    [
        ("RayService t2v", "spec.serveConfigV3", "", "serveConfigV3"),
        ("RayService t2v", f"{GPU}.{RAY}.volumeMounts.0.mountpath", "/tmp", "mountpath"),
        ("RayService t2v", f"{GPU}.groupName", GONE, "groupName"),
        ("RayService t2v", f"{GPU}.maxReplicas", "8", "not of type 'integer'"),
        ("RayService t2v", f"{CLUSTER}.gcsFaultToleranceOptions.backend", "sqlite", "sqlite"),
        ("RayService t2v", "metadata.annotation", {}, "annotation"),
        ("PodDisruptionBudget t2v-head", "spec.minAvialable", 1, "minAvialable"),
        ("NetworkPolicy t2v-http", "spec.policyTypes", "Ingress", "not of type 'array'"),
        ("Job t2v-weights", "apiVersion", "batch/v7", "neither Kubernetes"),
        ("PodMonitor t2v", "spec.podMetricsEndpoints.0.intervall", "15s", "intervall"),
        ("PrometheusRule t2v", "spec.groups.0.rules.0.labels.severity", "dire", "critical"),
    ],
)
def test_a_field_that_a_kind_does_not_have_is_refused(where, path, value, words, trees, known):
    found = [*check_schemas(changed(trees[POOL], Break("schema", words, path, value, where=where)), known)]
    assert [problem.rule for problem in found] != []
    assert any(words in problem.message and problem.where == where for problem in found), found


def test_a_dashboard_that_asks_for_another_metric_is_found(trees):
    broken = copy.deepcopy(trees[POOL])
    (config,) = (m for m in broken.manifests if m["kind"] == "ConfigMap")
    dashboard = json.loads(config["data"]["t2v.json"])
    assert len(dashboard["panels"]) > 10
    for panel in dashboard["panels"]:
        kept, panel["targets"][0]["expr"] = panel["targets"][0]["expr"], "sum(rate(ray_t2v_step_total[5m]))"
        config["data"]["t2v.json"] = json.dumps(dashboard)
        (problem,) = check_rules(broken)
        assert (problem.rule, panel["title"] in problem.where) == ("metric", True)
        panel["targets"][0]["expr"] = kept


def test_the_dashboard_shows_every_metric_of_the_service_in_panels_that_do_not_overlap(trees):
    (config,) = (m for m in trees[POOL].manifests if m["kind"] == "ConfigMap")
    panels = json.loads(config["data"]["t2v.json"])["panels"]
    shown = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    assert [spec.exported for spec in METRICS if not re.search(rf"\b{spec.exported}(_bucket)?\b", shown)] == []
    cells = Counter(
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["w"])
        for y in range(place["h"])
    )
    assert cells.most_common(1)[0][1] == 1
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.parametrize(("name", "ours", "other"), [(ONE, "embedded", "redis"), (POOL, "redis", "embedded")])
def test_each_overlay_takes_either_way_to_keep_the_clusters_state(name, ours, other, trees, known, tmp_path):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    file = tmp_path / "kuberay" / name / "kustomization.yaml"
    text = file.read_text()
    assert f"components/gcs-{ours}" in text
    file.write_text(text.replace(f"components/gcs-{ours}", f"components/gcs-{other}"))
    swapped = replace(trees[name], manifests=render(file.parent))
    assert swapped.manifests != trees[name].manifests
    assert [*check_schemas(swapped, known), *check_rules(swapped)] == []


@pytest.mark.parametrize("name", [ONE, POOL])
def test_with_the_component_for_traces_every_node_sends_them(name, trees, known, tmp_path):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    file = tmp_path / "kuberay" / name / "kustomization.yaml"
    file.write_text(file.read_text().replace("components:\n", "components:\n  - ../../components/tracing\n"))
    traced = replace(trees[name], manifests=render(file.parent))
    assert [*check_schemas(traced, known), *check_rules(traced)] == []
    maps = {m["metadata"]["name"]: m["data"] for m in traced.manifests if m["kind"] == "ConfigMap"}
    (service,) = (m for m in traced.manifests if m["kind"] == "RayService")
    for group in groups(service["spec"]["rayClusterConfig"]):
        (config,) = (source["configMapRef"]["name"] for source in group.ray["envFrom"] if "configMapRef" in source)
        assert import_attr(maps[config]["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"]) is otlp
        assert 0 < float(maps[config]["RAY_SERVE_TRACING_SAMPLING_RATIO"]) <= 1


def test_kustomize_refuses_what_is_not_there(tmp_path):
    (tmp_path / "kustomization.yaml").write_text("resources: [absent.yaml]")
    with pytest.raises(CannotRender, match=r"absent\.yaml"):
        render(tmp_path)


def test_quantities_are_read_as_kubernetes_does():
    assert [*map(quantity, ("500m", "2", 3, "1Ki", "8Gi", "1.5k"))] == [0.5, 2, 3, 1024, 8 << 30, 1500]


def test_a_problem_says_where_and_by_which_rule():
    assert str(Problem("fit", "RayService t2v", "too small")) == "RayService t2v: too small [fit]"


def changed(tree: Tree, broken: Break) -> Tree:
    """The tree with one value changed."""
    copied = copy.deepcopy(tree)
    (manifest,) = (m for m in copied.manifests if f"{m['kind']} {m['metadata']['name']}" == broken.where)
    if not broken.serve:
        put(manifest, broken.path, broken.value)
    else:
        config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
        put(config, broken.path, broken.value)
        manifest["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    assert copied != tree, f"{broken.path} has this value already"
    return copied


def put(part: Any, path: str, value: Any) -> None:
    *above, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in above:
        part = part[key]
    if value is GONE:
        del part[last]
    else:
        part[last] = value
