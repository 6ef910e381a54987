"""The deployed trees and KubeRay's CRDs, for what is checked; storage, for what runs on several Ray nodes."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from clustered import Storage, bucket
from databases import PostgreSQL, postgresql  # noqa: F401  # a fixture

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


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not pytest's own: Ray's sockets are in it, and their paths have 107 characters at most."""
    with TemporaryDirectory(prefix="t2v-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def storage(postgresql: PostgreSQL) -> Iterator[Storage]:  # noqa: F811
    """What all nodes reach: an empty database and an empty bucket."""
    with postgresql.database() as url, bucket() as artifacts:
        yield {"database": url, **artifacts}
