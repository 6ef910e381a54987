"""Whether those for whom work is done are still there.

A caller that dies cancels nothing: what it asked for runs on. So each call names its owners, and whoever works for them
looks from time to time.
"""

import asyncio
from collections.abc import Collection

import ray
from ray import serve

_SERVE_NAMESPACE = "serve"


def this_replica() -> str:
    """The replica that this code runs in, as an owner: the name of its actor."""
    return serve.get_replica_context().replica_id.to_full_id_str()


async def gone(owners: Collection[str]) -> set[str]:
    """Those of the owners that have died."""
    return await asyncio.to_thread(lambda: {owner for owner in owners if not _lives(owner)})


def _lives(owner: str) -> bool:
    try:
        ray.get_actor(owner, namespace=_SERVE_NAMESPACE)
    except ValueError:  # Ray's word for a name that no living actor has
        return False
    return True
