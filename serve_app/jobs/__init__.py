"""Jobs: what they are, and the store that keeps them."""

from serve_app.jobs.model import (
    ENDED,
    Artifact,
    Census,
    Change,
    Ended,
    Heartbeat,
    Job,
    JobStatus,
    NewJob,
    Origin,
    Page,
    Progress,
    Requeued,
    new_job_id,
)
from serve_app.jobs.outbox import Delivery, Outbox
from serve_app.jobs.store import JobStore

__all__ = [
    "ENDED",
    "Artifact",
    "Census",
    "Change",
    "Delivery",
    "Ended",
    "Heartbeat",
    "Job",
    "JobStatus",
    "JobStore",
    "NewJob",
    "Origin",
    "Outbox",
    "Page",
    "Progress",
    "Requeued",
    "new_job_id",
]
