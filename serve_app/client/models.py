"""What the client sends and gets: the settings of a video, the video, and its events.

The service's own schemas are not used, as they import torch; a test holds the two together.
"""

import base64
import json
from typing import Annotated, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Variant = Literal["video", "thumbnail", "spritesheet"]
SamplerName = Literal["ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_3m", "unipc"]
VideoFormat = Literal["mp4", "webm", "gif"]
Priority = Literal["urgent", "normal", "low"]


class VideoSettings(TypedDict, total=False):
    """All that a video may be asked for with, beside its prompt. What is absent or None takes the service's default."""

    model: str | None
    size: str | None
    seconds: str | float | None
    num_frames: int | None
    fps: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    sampler: SamplerName | None
    seed: int | None
    negative_prompt: str | None
    format: VideoFormat | None
    priority: Priority | None
    metadata: dict[str, str] | None
    webhook_url: str | None


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)  # a newer service may say more


class VideoError(_Answer):
    """Why a video failed."""

    code: str
    message: str


class Video(_Answer):
    """A video: how it is made, and how far it is. Times are unix seconds."""

    id: str
    object: str = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    size: str
    seconds: str
    prompt: str
    remixed_from_video_id: str | None
    error: VideoError | None
    seed: int
    negative_prompt: str
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    strength: float | None
    sampler: str
    format: str
    priority: str
    metadata: dict[str, str]
    step: int
    num_steps: int
    eta_s: float | None
    queue_position: int | None
    resumes: int

    @property
    def is_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ("completed", "failed", "cancelled")


class VideoPage(_Answer):
    """Some of the videos, and where the next ones begin."""

    data: list[Video]
    has_more: bool
    last_id: str | None


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str  # `events(..., last_event_id=)` goes on behind it


class Queued(_Event):
    """It waits. Position 0 is next; None where it is not known."""

    event: Literal["queued"] = "queued"
    position: int | None


class Progress(_Event):
    """Another step is done. `progress` is in percent."""

    event: Literal["progress"] = "progress"
    step: int
    num_steps: int
    eta_s: float | None
    progress: int


class Preview(_Event):
    """How the video looks at a step: `url` is a data URL."""

    event: Literal["preview"] = "preview"
    step: int
    url: str

    @property
    def picture(self) -> bytes:
        """The picture, as WebP."""
        return base64.b64decode(self.url.partition(",")[2])


class Resumed(_Event):
    """Its worker was lost, and another goes on at this step."""

    event: Literal["resumed"] = "resumed"
    step: int
    resumes: int


class Completed(_Event):
    """The video is made."""

    event: Literal["completed"] = "completed"
    video: Video


class Failed(_Event):
    """No video is made: `video.error` says why."""

    event: Literal["failed"] = "failed"
    video: Video


class Cancelled(_Event):
    """Somebody stopped it."""

    event: Literal["cancelled"] = "cancelled"
    video: Video


Ended = Completed | Failed | Cancelled
Event = Queued | Progress | Preview | Resumed | Ended
_EVENTS = ("queued", "progress", "preview", "resumed", "completed", "failed", "cancelled")
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


def event_of(name: str, data: str, event_id: str) -> Event | None:
    """The event of these fields of a stream, or None for one that this client does not know. Raises ValueError."""
    if name not in _EVENTS:
        return None
    fields = json.loads(data)
    if name in ("completed", "failed", "cancelled"):
        fields = {"video": fields}
    return _EVENT.validate_python({**fields, "event": name, "id": event_id})
