"""What nobody needs any more: videos past their time, and files that no job names."""

import logging

from serve_app.artifacts import ArtifactStore
from serve_app.errors import Unavailable
from serve_app.jobs import JobStore

logger = logging.getLogger(__name__)

_FOLDERS_AT_ONCE = 500
_PLACES_FOR_S = 86_400.0  # who lists has come to the next page by then


async def sweep(jobs: JobStore, artifacts: ArtifactStore, *, min_age_s: float) -> None:
    """Remove expired jobs with their files, folders older than `min_age_s` that no row names, and old places in lists.

    The row goes first: what is left of its files when this is cut short is found the next time.
    """
    while expired := await jobs.expired():
        for job in expired:
            await jobs.forget(job.id)
            logger.info("expired: job=%s", job.id)
            await _remove(artifacts, job.id)
    await jobs.forget_removed(_PLACES_FOR_S)
    old = await artifacts.prefixes(min_age_s)
    for start in range(0, len(old), _FOLDERS_AT_ONCE):
        prefixes = old[start : start + _FOLDERS_AT_ONCE]
        folders = [prefix.partition("/") for prefix in prefixes]
        known = await jobs.get_many({job_id for job_id, _, _ in folders})
        for prefix, (job_id, _, fence) in zip(prefixes, folders, strict=True):
            is_needed = job_id in known and known[job_id].needs(fence)
            if not is_needed and not await jobs.names_prefix(prefix):  # the batch was read a while ago
                await _remove(artifacts, prefix)


async def _remove(artifacts: ArtifactStore, prefix: str) -> None:
    """One that cannot be removed, as it is another user's, must not keep the others from it."""
    try:
        await artifacts.delete_prefix(f"{prefix}/")
        logger.info("swept: prefix=%s", prefix)
    except Unavailable as error:
        logger.warning("not swept: prefix=%s error=%s", prefix, error)
