"""What Serve tells a deployment's class in its replica, for tests without Serve."""

from typing import TypeVar

import pytest
from ray.serve import context
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ReplicaRank

_Deployment = TypeVar("_Deployment")


def unserved(deployment: type[_Deployment]) -> type[_Deployment]:
    """The class without its `__del__`, which Serve awaits, and Python calls and does not."""
    return type(deployment.__name__, (deployment,), {"__del__": lambda _: None})


def become_replica(deployment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the only replica of a deployment, as long as the test lasts."""
    monkeypatch.setattr(context, "_INTERNAL_REPLICA_CONTEXT", None)
    context._set_internal_replica_context(
        replica_id=ReplicaID("replica", DeploymentID(deployment, "t2v")),
        servable_object=None,
        _deployment_config=DeploymentConfig(),
        rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
        world_size=1,
    )
