"""When this node goes: one that is drained, as a spot node is with notice, says so beforehand."""

import asyncio
import time

import ray
from ray._private.worker import global_worker

_ANSWER_WITHIN_S = 5


async def leaves_in_s() -> float | None:
    """Seconds until this node goes; None if it stays, or has no time set: then it waits for what runs on it."""
    gcs_client = global_worker.gcs_client  # type: ignore[attr-defined]  # there is no public way to ask
    deadlines = await asyncio.to_thread(gcs_client.get_draining_nodes, timeout=_ANSWER_WITHIN_S)
    deadline_ms = deadlines.get(ray.get_runtime_context().get_node_id(), 0)
    return deadline_ms / 1_000 - time.time() if deadline_ms else None
