"""What becomes of jobs, told to the metrics."""

from serve_app import metrics
from serve_app.jobs import Change, Ended, JobStore
from serve_app.metrics import Metrics


def count_change(told: Metrics, change: Change) -> None:
    """Once for each change that was committed."""
    if isinstance(change, Ended):
        told.count(metrics.JOBS_ENDED, status=change.status)
        return
    told.count(metrics.RETRIES, int(change.is_retry))
    told.count(metrics.RESUMES, int(change.is_resume))
    told.count(metrics.STEPS_REPEATED, change.steps_repeated)


async def tell_census(told: Metrics, jobs: JobStore) -> None:
    """What is in the database now. Raises Unavailable."""
    census = await jobs.census()
    for status, num_jobs in census.by_status.items():
        told.set(metrics.JOBS, num_jobs, status=status)
    for priority, num_jobs in census.queued.items():
        told.set(metrics.QUEUE_DEPTH, num_jobs, priority=priority)
    told.set(metrics.QUEUE_OLDEST, census.oldest_queued_s)
