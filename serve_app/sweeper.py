"""What nobody needs any more: videos past their time, and files that no job names."""

import logging

from serve_app.artifacts import ArtifactStore
from serve_app.jobs import JobStore

logger = logging.getLogger(__name__)


async def sweep(jobs: JobStore, artifacts: ArtifactStore, *, min_age_s: float) -> None:
    """Remove expired jobs with their files, and folders older than `min_age_s` that no row names.

    The row goes first: what is left of its files when this is cut short is found the next time.
    """
    for job in await jobs.expired():
        await jobs.forget(job.id)
        await artifacts.delete_prefix(f"{job.id}/")
        logger.info("expired: job=%s", job.id)
    for prefix in await artifacts.prefixes(min_age_s):
        if not await jobs.names_prefix(prefix):
            await artifacts.delete_prefix(f"{prefix}/")
            logger.info("swept: prefix=%s", prefix)
