"""Where replicas may be: is there room for each, and is what needs no GPU kept off the nodes that have one?"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from cluster.manifests import Group, Problem
from serve_app.config import AppConfig, Placement

_RAYS_OWN_LABELS = "ray.io/"  # zones and the like: nodes get most of them where they start


@dataclass(slots=True)
class _Node:
    """What is still free on a node; a fraction of a GPU is on one GPU."""

    cpus: float
    gpus: list[float]
    resources: dict[str, float]
    labels: dict[str, str]
    held: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Replica:
    name: str
    placement: Placement

    @property
    def gpus(self) -> float:
        return self.placement.taken.get("GPU", 0.0)


def check_placement(where: str, app: AppConfig, groups: list[Group]) -> Iterator[Problem]:
    """All rules on where replicas may be."""
    yield from _fits(where, app, groups)
    yield from _stays_away(where, app, groups)


def _fits(where: str, app: AppConfig, groups: list[Group]) -> Iterator[Problem]:
    """All replicas at once find room at their most, and the ones that are always there on the nodes always there.

    So do, on all nodes that may be, those and the ones of another configuration that are started before these stop.
    """

    def problem(rule: str, replicas: list[_Replica], most: bool, why: str) -> Iterator[Problem]:
        left = _left_out(replicas, groups, most)
        if left:
            names = ", ".join(sorted({replica.name for replica in left}))
            yield Problem(rule, where, f"{len(left)} replicas ({names}) {why}")

    yield from problem(
        "rollout",
        _replicas(app, most=False, rolling=True),
        True,
        "of a new configuration find no room beside the old ones, and Serve waits for ever: raise maxReplicas, or lower"
        " num_cpus or max_surge_percent",
    )
    for most, size in ((True, "maxReplicas"), (False, "minReplicas")):
        yield from problem(
            "fit",
            _replicas(app, most),
            most,
            f"find no room on the groups' {size} nodes, GPUs or cores, or no labels that they select: raise {size},"
            f" lower {'max' if most else 'min'}_replicas, or label a group",
        )


def _stays_away(where: str, app: AppConfig, groups: list[Group]) -> Iterator[Problem]:
    """What needs no GPU is neither on the nodes that have one nor on the head."""
    for group in groups:
        if group.gpus and group.cpus:
            yield Problem(
                "GPU nodes",
                where,
                f"group {group.name} has GPUs and {group.cpus:g} CPUs: Serve spreads replicas without GPU onto it, and"
                ' their cores are then missing beside the GPU; give it resources: {CPU: "0"}',
            )
    for part in _replicas(app, most=True) if len(groups) > 1 else []:
        asks = part.placement
        if not (part.gpus or asks.num_cpus or asks.resources or asks.label_selector):
            yield Problem(
                "placement",
                where,
                f"{part.name} has num_cpus 0 and no label_selector: it has room everywhere, also on the head and on GPU"
                " nodes; give it a share of a core, or a label_selector",
            )


def _replicas(app: AppConfig, most: bool, *, rolling: bool = False) -> list[_Replica]:
    """At most or at least; with `rolling`, and the new ones that may be there beside them, largest first."""

    def with_new(count: int, placement: Placement) -> int:
        return count + math.ceil(count * placement.max_surge_percent / 100) if rolling else count

    found: list[_Replica] = []
    for name, part in app.parts.items():
        count = part.replicas[1 if most else 0]
        found += with_new(count, part) * [_Replica(name, part)]
    return sorted(found, key=lambda replica: (replica.gpus, replica.placement.num_cpus), reverse=True)


def _left_out(replicas: list[_Replica], kinds: list[Group], most: bool) -> list[_Replica]:
    """First fit, largest first: what fits so can also be scheduled; whether Ray finds that is its own affair."""
    nodes = [
        _Node(kind.cpus, [1.0] * int(kind.gpus), dict(kind.resources), kind.labels)
        for kind in sorted(kinds, key=lambda kind: kind.gpus)
        for _ in range(kind.most if most else kind.least)
    ]
    return [replica for replica in replicas if not any(_placed(replica, node) for node in nodes)]


def _placed(replica: _Replica, node: _Node) -> bool:
    slack = 1e-6
    asks, wanted = replica.placement, replica.placement.resources
    if asks.num_cpus > node.cpus + slack or any(node.resources.get(key, 0) < wanted[key] for key in wanted):
        return False
    if not _selects(asks.label_selector, node.labels):
        return False
    if asks.max_replicas_per_node is not None and node.held[replica.name] >= asks.max_replicas_per_node:
        return False
    share = min(replica.gpus, 1.0)
    free = [number for number, rest in enumerate(node.gpus) if rest + slack >= share][: max(1, int(replica.gpus))]
    if replica.gpus and len(free) < max(1, int(replica.gpus)):
        return False
    for number in free if replica.gpus else []:
        node.gpus[number] -= share
    node.cpus -= asks.num_cpus
    for key in wanted:
        node.resources[key] -= wanted[key]
    node.held[replica.name] += 1
    return True


def _selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Ray's conditions on labels: VALUE, in(A,B), or either with ! before it."""
    for key, condition in selector.items():
        if key.startswith(_RAYS_OWN_LABELS) and key not in labels:
            continue
        values = condition.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
        if (labels.get(key) in [value.strip() for value in values]) == condition.startswith("!"):
            return False
    return True
