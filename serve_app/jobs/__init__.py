"""Jobs: what they are, and the store that keeps them."""

from serve_app.jobs.model import (
    ENDED,
    Artifact,
    Heartbeat,
    Job,
    JobStatus,
    NewJob,
    Page,
    Progress,
    new_job_id,
)
from serve_app.jobs.outbox import Delivery, Outbox
from serve_app.jobs.store import JobStore

__all__ = [
    "ENDED",
    "Artifact",
    "Delivery",
    "Heartbeat",
    "Job",
    "JobStatus",
    "JobStore",
    "NewJob",
    "Outbox",
    "Page",
    "Progress",
    "new_job_id",
]
