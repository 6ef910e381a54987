"""What goes over the wire: the bodies that callers send, and the objects that they get."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from serve_app.errors import ErrorType
from serve_app.jobs.model import Job, JobStatus
from t2v_core.config import SamplerName
from t2v_core.engine import Priority
from t2v_core.media import VideoFormat
from t2v_core.params import MAX_FPS, MAX_FRAMES, MAX_PROMPT_CHARACTERS, MAX_SEED

Variant = Literal["video", "thumbnail", "spritesheet"]


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "must not hold NUL characters")  # PostgreSQL has no text with one
    return text


def _range(low: float, high: float) -> JsonDict:
    """Bounds for the document alone: GenerationParams checks them, with its own messages."""
    return {"minimum": low, "maximum": high}


_Text = Annotated[str, AfterValidator(_without_nul), Field(json_schema_extra={"maxLength": MAX_PROMPT_CHARACTERS})]
_Key = Annotated[str, AfterValidator(_without_nul), Field(min_length=1, max_length=64)]
_Value = Annotated[str, AfterValidator(_without_nul), Field(max_length=512)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SyncVideo(_Body):
    """A video to make. What is left out takes the checkpoint's default; without a seed, one is drawn."""

    prompt: _Text
    model: str | None = Field(None, description="One of GET /v1/models; the first when left out.")
    size: str | None = Field(None, description='Width and height, as "256x256"; multiples of 8.')
    seconds: str | int | float | None = Field(None, description="Length in seconds; not together with num_frames.")
    seed: int | None = Field(None, json_schema_extra=_range(0, MAX_SEED))
    negative_prompt: _Text | None = None
    num_frames: int | None = Field(None, json_schema_extra=_range(1, MAX_FRAMES))
    fps: int | None = Field(None, json_schema_extra=_range(1, MAX_FPS))
    num_inference_steps: int | None = Field(None, json_schema_extra=_range(1, 999))
    guidance_scale: float | None = Field(None, json_schema_extra=_range(0, 100))
    sampler: SamplerName | None = None
    format: VideoFormat | None = None


class CreateVideo(SyncVideo):
    """A video to make as a job."""

    priority: Priority | None = Field(None, description="normal when left out.")
    metadata: Annotated[dict[_Key, _Value], Field(max_length=16)] | None = Field(
        None, description="Yours to use; it is given back with the job."
    )
    webhook_url: Annotated[str, AfterValidator(_without_nul)] | None = Field(
        None, description="Told when the video has ended, by a signed POST (standardwebhooks.com).", max_length=2048
    )


class VideoReference(_Body):
    """A completed video of the caller's."""

    id: _Text


class EditVideo(CreateVideo):
    """A video to make of another one: an uploaded file, or a completed video by its id."""

    video: VideoReference | None = Field(
        None, description='{"id": "video_..."}; in multipart, a file: mp4, webm, mov, gif and others.'
    )
    strength: float | None = Field(
        None, description="How much is made anew, from above 0 to 1.", json_schema_extra=_range(0, 1)
    )


class RemixVideo(_Body):
    """Another prompt for the seed and the settings of an earlier video."""

    prompt: _Text


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A job, as OpenAI's clients know it, and what is ours besides. Times are unix seconds."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: JobStatus
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int | None
    size: str
    seconds: str
    prompt: str
    remixed_from_video_id: str | None
    error: JobError | None
    seed: int
    negative_prompt: str
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    strength: float | None = Field(description="Of an edit.")
    sampler: SamplerName
    format: VideoFormat
    priority: Priority
    metadata: dict[str, str]
    step: int
    num_steps: int
    eta_s: float | None
    queue_position: int | None = Field(description="0 is next. Only where one queued job is asked for.")
    resumes: int = Field(description="How often it went on from a checkpoint.")


def video_object(job: Job, queue_position: int | None = None) -> VideoObject:
    """The job as its owner sees it."""
    params: Mapping[str, object] = job.params
    error = JobError(code=job.error_code, message=job.error_message or "") if job.error_code is not None else None
    num_frames, fps = job.params["num_frames"], job.params["fps"]
    assert isinstance(num_frames, int)
    assert isinstance(fps, int)
    return VideoObject.model_validate(
        {
            **{name: params[name] for name in VideoObject.model_fields if name in params},
            "strength": params.get("strength"),
            "id": job.id,
            "model": job.model,
            "status": job.status,
            "progress": job.progress,
            "created_at": int(job.created_at),
            "completed_at": _whole(job.completed_at),
            "expires_at": _whole(job.expires_at),
            "size": f"{params['width']}x{params['height']}",
            "seconds": f"{num_frames / fps:g}",
            "prompt": job.prompt,
            "remixed_from_video_id": job.remixed_from,
            "error": error,
            "priority": job.priority,
            "metadata": job.metadata,
            "step": job.step,
            "num_steps": job.num_steps,
            "eta_s": job.eta_s,
            "queue_position": queue_position,
            "resumes": job.resumes,
        }
    )


def _whole(time_s: float | None) -> int | None:
    return None if time_s is None else int(time_s)


class VideoList(BaseModel):
    """A page of jobs. Ask for the next one with `after` = `last_id`."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedVideo(BaseModel):
    """The job and its files are gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ModelObject(BaseModel):
    """A checkpoint that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0  # nobody knows
    owned_by: str = "t2v"


class ModelList(BaseModel):
    """The checkpoints that are served; the first is the default."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether the service can take work, and each part of it."""

    ready: bool
    parts: dict[str, bool]


class ErrorDetail(BaseModel):
    """What was wrong: the value, the rule, the remedy. `param` names the field at fault where there is one."""

    message: str
    type: ErrorType
    param: str | None
    code: str


class ErrorEnvelope(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail
