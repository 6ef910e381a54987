"""Checks all that would be deployed on Kubernetes, without a Kubernetes: `python -m cluster.validate`.

The CRDs of KubeRay come from `--crds`, from the folder that T2V_KUBERAY_CRDS names, or from ../shared/kuberay.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.manifests import CannotRender, Manifest, Problem, load, render
from cluster.monitoring import check_monitoring
from cluster.operator_rules import check_operator
from cluster.render import KUBERAY, ROOT
from cluster.schemas import Crds, check_schema, crds
from cluster.security import check_security
from cluster.serving import check_serving

logger = logging.getLogger(__name__)

FOLDERS = ("overlays/one-gpu", "overlays/gpu-pool", "overlays/dev", "examples/handle-caller")
_APPLIED_LATER = ("ingress.yaml", "handle-caller/job-call.yaml")
CRDS = "T2V_KUBERAY_CRDS"
_BESIDE = ROOT.parent.parent / "shared" / "kuberay"


@dataclass(frozen=True, slots=True)
class Tree:
    """What is deployed together, and what the guide applies later in the same namespace."""

    name: str
    manifests: list[Manifest]
    secrets: list[Manifest]
    guide: str
    ray_version: str


def tree(name: str) -> Tree:
    """A folder of cluster/kuberay, rendered. Raises CannotRender."""
    manifests = render(KUBERAY / name)
    namespaces = {manifest["metadata"].get("namespace") for manifest in manifests}
    examples = [manifest for name in _APPLIED_LATER for manifest in load(KUBERAY / "examples" / name)]
    later = [manifest for manifest in examples if manifest["metadata"]["namespace"] in namespaces]
    pins = (ROOT.parent / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (ray_version,) = (line.removeprefix("ray==") for line in pins if line.startswith("ray=="))
    return Tree(
        name=name,
        manifests=manifests + later,
        secrets=load(KUBERAY / "examples" / "secrets.yaml"),
        guide=(ROOT / "README.md").read_text(encoding="utf-8"),
        ray_version=ray_version,
    )


def check_schemas(tree: Tree, known: Crds) -> Iterator[Problem]:
    """Whether Kubernetes would take them as they are."""
    for manifest in (*tree.manifests, *tree.secrets):
        yield from check_schema(manifest, known)


def check_rules(tree: Tree) -> Iterator[Problem]:
    """Whether they would work, as far as that can be told without running them."""
    yield from check_operator(tree.manifests, tree.ray_version)
    yield from check_serving(tree.manifests, tree.secrets)
    yield from check_security(tree.manifests, tree.secrets)
    yield from check_monitoring(tree.manifests, tree.guide)


def crds_folder() -> Path | None:
    """Where KubeRay's CRDs are, if anywhere: named by the environment, or beside the checkout."""
    named = os.environ.get(CRDS)
    return Path(named) if named else _BESIDE if _BESIDE.is_dir() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--crds", type=Path, default=crds_folder(), help="the folder of KubeRay's ray.io_*.yaml")
    folder = parser.parse_args().crds
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if folder is None:
        parser.error(f"no CRDs: name the folder config/crd/bases of KubeRay's release by --crds or {CRDS}")
    try:
        known = crds(folder)
        trees = [tree(name) for name in FOLDERS]
    except (CannotRender, FileNotFoundError) as error:
        parser.error(str(error))
    found = 0
    for deployed in trees:
        problems = [*check_schemas(deployed, known), *check_rules(deployed)]
        for problem in problems:
            logger.info("%s: %s", deployed.name, problem)
        logger.info("%s: %d manifests, %d problems", deployed.name, len(deployed.manifests), len(problems))
        found += len(problems)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
