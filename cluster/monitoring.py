"""Do alerts and dashboards ask for metrics that exist? Each query is parsed, and each name in it looked up."""

import json
from collections.abc import Iterator
from typing import TypeVar

import promql_parser

from cluster.manifests import Manifest, Problem, name_of, of_kind, pods
from serve_app.metrics import METRICS, MetricSpec

# What Ray itself tells of the service; tests/cluster/test_on_ray.py looks for each in what a running one exports.
RAYS_OWN: dict[str, tuple[str, ...]] = {
    "ray_serve_application_status": ("application",),
    "ray_serve_deployment_status": ("application", "deployment"),
    "ray_serve_num_http_requests_total": ("application", "status_code"),
}
_EVERYWHERE = ("application", "deployment", "replica")
_IN_BUCKETS = ("_bucket", "_sum", "_count")

_Expression = TypeVar("_Expression")


def exported() -> dict[str, set[str]]:
    """The labels of each series, by the name in which Prometheus has it."""
    found = {name: set(labels) for name, labels in RAYS_OWN.items()}
    for spec in METRICS:
        for name in _series(spec):
            found[name] = {*spec.labels, *_EVERYWHERE, *(["le"] if name.endswith("_bucket") else [])}
    return found


def check_monitoring(manifests: list[Manifest], guide: str) -> Iterator[Problem]:
    """All rules on PrometheusRules, dashboards and PodMonitors. `guide`: the text that explains each alert."""
    known = exported()
    for where, query in _queries(manifests):
        yield from _check_query(where, query, known)
    for rule in of_kind(manifests, "PrometheusRule"):
        for group in rule["spec"]["groups"]:
            for alert in group["rules"]:
                if f"`{alert['alert']}`" not in guide:
                    yield Problem(
                        "guide", name_of(rule), f"{alert['alert']} is not in cluster/README.md: say what to do"
                    )
    for monitor in of_kind(manifests, "PodMonitor"):
        yield from _check_scraped(monitor, manifests)


def _series(spec: MetricSpec) -> list[str]:
    return [spec.exported + suffix for suffix in _IN_BUCKETS] if spec.kind == "histogram" else [spec.exported]


def _queries(manifests: list[Manifest]) -> Iterator[tuple[str, str]]:
    for rule in of_kind(manifests, "PrometheusRule"):
        for group in rule["spec"]["groups"]:
            yield from ((f"{name_of(rule)} {alert['alert']}", alert["expr"]) for alert in group["rules"])
    for config in of_kind(manifests, "ConfigMap"):
        for name, text in config.get("data", {}).items():
            if name.endswith(".json"):
                for panel in json.loads(text)["panels"]:
                    for target in panel["targets"]:
                        yield f"{name_of(config)} {panel['title']}", target["expr"]


def _check_query(where: str, query: str, known: dict[str, set[str]]) -> Iterator[Problem]:
    try:
        parsed = promql_parser.parse(query)
    except ValueError as error:
        yield Problem("query", where, f"{query}: Prometheus cannot read it: {error}; correct it")
        return
    for aggregate in _all_of(parsed, promql_parser.AggregateExpr):
        yield from _check_grouping(where, aggregate, known)
    for selector in _all_of(parsed, promql_parser.VectorSelector):
        if selector.name not in known:
            message = f"{selector.name}: neither serve_app.metrics declares it nor cluster.monitoring; correct the name"
            yield Problem("metric", where, message)
            continue
        for matcher in selector.matchers.matchers:
            if matcher.name not in known[selector.name]:
                labels = ", ".join(sorted(known[selector.name]))
                yield Problem("metric", where, f"{selector.name} has no label {matcher.name}: it has {labels}")


def _check_grouping(
    where: str, aggregate: promql_parser.AggregateExpr, known: dict[str, set[str]]
) -> Iterator[Problem]:
    """What is summed `by` a label that no series below has is one sum of all, and nobody notices."""
    below = [selector.name or "" for selector in _all_of(aggregate.expr, promql_parser.VectorSelector)]
    if aggregate.modifier is None or not known.keys() >= set(below):
        return
    labels = set[str]().union(*(known[name] for name in below))
    for label in aggregate.modifier.labels:
        if label not in labels:
            message = f"{aggregate.op}: {', '.join(below)} has no label {label}: it has {', '.join(sorted(labels))}"
            yield Problem("metric", where, message)


def _all_of(expression: object, kind: type[_Expression]) -> Iterator[_Expression]:
    """All parts of a query that are of this kind."""
    if isinstance(expression, kind):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "args"):
        part = getattr(expression, name, None)
        for below in part if isinstance(part, list) else [part]:
            if below is not None:
                yield from _all_of(below, kind)


def _check_scraped(monitor: Manifest, manifests: list[Manifest]) -> Iterator[Problem]:
    """Each Ray pod is selected, and has the port under the name that is asked for."""
    labels: dict[str, str] = monitor["spec"]["selector"]["matchLabels"]
    for manifest in of_kind(manifests, "RayService", "RayCluster"):
        for pod in pods(manifest):
            ports = {port["name"] for container in pod.containers for port in container.get("ports", [])}
            asked = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
            if not labels.items() <= pod.labels.items():
                yield Problem(
                    "scrape", name_of(monitor), f"does not select {pod.path} of {name_of(manifest)}: label it"
                )
            if not asked <= ports:
                missing = ", ".join(sorted(asked - ports))
                yield Problem("scrape", name_of(monitor), f"port {missing} is not one of {pod.path}: name it there")
