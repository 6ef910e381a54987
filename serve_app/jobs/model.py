"""What a job is: plain data. It is accepted once and ends once, whatever dies meanwhile."""

import secrets
from dataclasses import dataclass
from typing import Literal, NamedTuple

from t2v_core.engine import Priority

JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
ENDED: frozenset[JobStatus] = frozenset({"completed", "failed", "cancelled"})

Scalar = str | int | float | bool | None


def new_job_id() -> str:
    return f"video_{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of a job. `path` is in the artifact store; `etag` is the sha256 of its bytes."""

    path: str
    media_type: str
    size_bytes: int
    etag: str


class Origin(NamedTuple):
    """Where a job comes from: Serve's id of the request, and its trace as W3C's traceparent."""

    request_id: str | None
    traceparent: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job as it is asked for. `params`: every setting of its GenerationParams but prompt and input video.

    request_id, traceparent: of its Origin, for logs and traces alone.
    """

    id: str
    owner: str
    model: str
    prompt: str
    params: dict[str, Scalar]
    priority: Priority
    metadata: dict[str, str]
    remixed_from: str | None
    input_path: str | None
    idempotency_key: str | None
    body_hash: str | None
    webhook_url: str | None = None
    request_id: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(NewJob):
    """A job as it stands. Times are unix seconds by the database's clock.

    fence: grows with every claim, and only its owner can write. attempts: those that ended without progress.
    """

    status: JobStatus
    step: int
    num_steps: int
    eta_s: float | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    fence: int
    claimed_by: str | None
    lease_until: float | None
    cancel_requested: bool
    attempts: int
    resumes: int
    steps_repeated: int
    checkpoint_path: str | None
    checkpoint_step: int
    preview_path: str | None
    preview_step: int
    error_code: str | None
    error_message: str | None
    artifacts: dict[str, Artifact]

    @property
    def progress(self) -> int:
        """In percent; 100 is only said of a video that is there."""
        if self.status == "completed":
            return 100
        return min(99, 100 * self.step // self.num_steps) if self.num_steps else 0

    @property
    def is_edit(self) -> bool:
        """Whether it is made of another video. `input_path` names that until the job ends without one of its own."""
        return self.params.get("strength") is not None

    @property
    def is_ended(self) -> bool:
        return self.status in ENDED

    def needs(self, fence: str) -> bool:
        """Whether it is being made in its folder of this fence, or names a file there."""
        if self.status == "in_progress" and fence == str(self.fence):
            return True
        paths = [self.input_path, self.checkpoint_path, self.preview_path, *(a.path for a in self.artifacts.values())]
        return any(path is not None and path.startswith(f"{self.id}/{fence}/") for path in paths)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the owner of a claim is."""

    job_id: str
    fence: int
    step: int
    num_steps: int
    eta_s: float | None
    preview_path: str | None = None
    preview_step: int = 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What an owner learns when it reports: jobs that are not its own any more, and jobs to be cancelled."""

    lost: set[str]
    cancel_requested: set[str]


class Removed(NamedTuple):
    """How a job had ended that is not there any more."""

    status: JobStatus
    completed_at: float


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list of jobs."""

    jobs: list[Job]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """A job has ended."""

    status: JobStatus


@dataclass(frozen=True, slots=True)
class Requeued:
    """A job is queued again. is_retry: since its attempt failed. is_resume: to go on from a checkpoint."""

    is_retry: bool
    is_resume: bool
    steps_repeated: int


Change = Ended | Requeued


@dataclass(frozen=True, slots=True)
class Census:
    """How many jobs there are: by status, and those that wait by priority, the oldest of them for so many seconds."""

    by_status: dict[JobStatus, int]
    queued: dict[Priority, int]
    oldest_queued_s: float
