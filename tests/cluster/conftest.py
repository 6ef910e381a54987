"""The deployed trees, rendered once, and KubeRay's CRDs where they are."""

import os

import pytest

from cluster.schemas import Crds, crds
from cluster.validate import CRDS, FOLDERS, Tree, crds_folder, tree


@pytest.fixture(scope="session")
def trees() -> dict[str, Tree]:
    return {name: tree(name) for name in FOLDERS}


@pytest.fixture(scope="session")
def known() -> Crds:
    """Skips where nobody says where the CRDs are; where somebody does, and one is missing, that is a failure."""
    folder = crds_folder()
    if folder is None:
        pytest.skip(f"KubeRay's CRDs: neither {CRDS} is set nor is ../shared/kuberay there")
    if CRDS not in os.environ and not any(folder.glob("ray.io_*.yaml")):
        pytest.skip(f"KubeRay's CRDs: {folder} has none")
    return crds(folder)
