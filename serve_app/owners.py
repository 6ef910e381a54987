"""Whether those for whom work is done are still there.

A caller that dies cancels nothing: what it asked for runs on. So each call names its owners, and whoever works for them
looks from time to time. An owner is a replica, by the name of its actor, or a Ray job, by its id.
"""

import asyncio
import re
from collections.abc import Collection

import ray
import ray._private.state
from ray import serve

from t2v_core.errors import InvalidRequest

_SERVE_NAMESPACE = "serve"
_JOB = "job:"


def this_replica() -> str:
    """The replica that this code runs in, as an owner: the name of its actor."""
    return serve.get_replica_context().replica_id.to_full_id_str()


def ray_job(job_id: str) -> str:
    """A Ray job as an owner. Raises InvalidRequest for what is no id of one."""
    if re.fullmatch("[0-9a-f]{8}", job_id) is None:
        raise InvalidRequest(
            f"caller {job_id!r:.100}: must be the id of a Ray job, as ray.get_runtime_context().get_job_id() gives it",
            param="caller",
        )
    return f"{_JOB}{job_id}"


async def gone(owners: Collection[str]) -> set[str]:
    """Those of the owners that have died."""
    return await asyncio.to_thread(_gone, owners)


def _gone(owners: Collection[str]) -> set[str]:
    calling_jobs = {owner for owner in owners if owner.startswith(_JOB)}
    lost = {owner for owner in owners if owner not in calling_jobs and not _lives(owner)}
    if calling_jobs:
        # Ray's public list of jobs needs the dashboard, which need not run.
        known = ray._private.state.jobs()  # type: ignore[no-untyped-call]
        ended = {f"{_JOB}{job['JobID']}" for job in known if job["IsDead"]}
        lost |= calling_jobs & ended
    return lost


def _lives(owner: str) -> bool:
    try:
        ray.get_actor(owner, namespace=_SERVE_NAMESPACE)
    except ValueError:  # Ray's word for a name that no living actor has
        return False
    return True
