"""From a body to a request that keeps every rule, and to the job that is stored for it."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from torch import Tensor

from serve_app import inputs
from serve_app.bodies import Body
from serve_app.jobs.model import Job, NewJob, new_job_id
from serve_app.schemas import CreateVideo, SyncVideo
from serve_app.sizes import SizeLimit
from t2v_core.config import GenerationDefaults
from t2v_core.errors import InvalidRequest
from t2v_core.params import MAX_FPS, MAX_FRAMES, GenerationParams, Settings, resolve

_Asked = TypeVar("_Asked", bound=BaseModel)
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def parse(schema: type[_Asked], body: Body) -> _Asked:
    """The body as this type. Raises InvalidRequest that names the field at fault."""
    values = dict(body.values)
    if values.pop("input_reference", None) is not None:
        raise InvalidRequest(
            "input_reference: this version makes videos from text only; leave it out", param="input_reference"
        )
    try:
        # Text is read as numbers only where there is nothing but text: in JSON, "5" is no number and true is not 1.
        return schema.model_validate(values, strict=not body.is_text_only)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False), tuple(schema.model_fields)) from error


def invalid_request(errors: Sequence[ErrorDetails], known: tuple[str, ...] = ()) -> InvalidRequest:
    """The first field at fault of pydantic's errors, and what is wrong with it, in the words of this package."""
    first = errors[0]
    name = str(first["loc"][0]) if first["loc"] else "body"
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"{name:.100}: no such field; there are {', '.join(known)}", param=name[:100])
    if first["type"] == "missing":
        return InvalidRequest(f"{name} is missing: give one", param=name)
    # A value that may be of several types fails once for each.
    rules = " or ".join(dict.fromkeys(error["msg"] for error in errors if error["loc"][:1] == first["loc"][:1]))
    place = "".join(f"[{key!r:.100}]" for key in first["loc"][1:] if first["loc"][0] == "metadata" and key != "[key]")
    return InvalidRequest(f"{name}{place} {first['input']!r:.100}: {rules}", param=name)


def generation_params(
    asked: SyncVideo,
    defaults: GenerationDefaults,
    *,
    size_limit: SizeLimit | None = None,
    video: bytes | None = None,
    max_video_bytes: int = 0,
) -> GenerationParams:
    """The request with every setting filled in and every rule checked, and its input video read: that takes a while.

    Raises InvalidRequest.
    """
    settings = cast(
        Settings,
        {name: value for name, value in asked.model_dump().items() if name in Settings.__annotations__},
    )
    if asked.size is not None:
        settings["width"], settings["height"] = _sides(asked.size)
    if asked.seconds is not None:
        if asked.num_frames is not None:
            raise InvalidRequest(
                f"seconds {asked.seconds} with num_frames {asked.num_frames}: both say how long it is; give one",
                param="seconds",
            )
        settings["num_frames"] = _num_frames(asked.seconds, _fps(asked, defaults))
    try:
        return inputs.resolve_within(size_limit, asked.prompt, settings, defaults, video, max_bytes=max_video_bytes)
    except InvalidRequest as error:
        raise _as_spelt(error, asked) from error


def remixed_params(
    job: Job, prompt: str, defaults: GenerationDefaults, frames: Tensor | None = None
) -> GenerationParams:
    """The settings, the seed and the input's frames of an earlier job with another prompt. Raises InvalidRequest."""
    return resolve(prompt, cast(Settings, job.params), defaults, frames)


def new_job(
    params: GenerationParams,
    *,
    owner: str,
    model: str,
    asked: CreateVideo | None = None,
    remix_of: Job | None = None,
    input_hash: str | None = None,
    idempotency_key: str | None = None,
) -> NewJob:
    """The row for a request: of what was `asked`, or a remix of an earlier job. `input_hash` tells inputs apart."""
    settings = {
        setting.name: getattr(params, setting.name)
        for setting in dataclasses.fields(params)
        if setting.name not in ("prompt", "video")
    }
    priority = remix_of.priority if remix_of is not None else "normal"
    if asked is not None and asked.priority is not None:
        priority = asked.priority
    job_id = new_job_id()
    new = NewJob(
        id=job_id,
        owner=owner,
        model=model,
        prompt=params.prompt,
        params=settings,
        priority=priority,
        metadata=(asked.metadata if asked is not None else None) or {},
        remixed_from=remix_of.id if remix_of is not None else None,
        input_path=None if params.video is None else inputs.path_of(job_id),
        idempotency_key=idempotency_key,
        body_hash=None,
        webhook_url=asked.webhook_url if asked is not None else None,
    )
    if idempotency_key is None:
        return new
    # A drawn seed is another each time, though the body is the same.
    seed_is_drawn = asked is not None and asked.seed is None
    settings_asked = settings | {"seed": None} if seed_is_drawn else settings
    return dataclasses.replace(new, body_hash=_hash(new, settings_asked, input_hash))


def _hash(new: NewJob, settings: Mapping[str, object], input_hash: str | None) -> str:
    asked_for = [new.model, new.prompt, settings, new.priority, new.metadata, new.remixed_from]
    # Only where there is any: hashes of earlier versions stay as they are.
    asked_for += [extra for extra in (new.webhook_url, input_hash) if extra is not None]
    return hashlib.sha256(json.dumps(asked_for, sort_keys=True).encode()).hexdigest()


def _sides(size: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(size)
    if match is None:
        raise InvalidRequest(f'size {size!r:.100}: must be width x height, as "256x256"', param="size")
    return int(match[1]), int(match[2])


def _fps(asked: SyncVideo, defaults: GenerationDefaults) -> int:
    """The frame rate that counts; an impossible one is refused later, by its own name."""
    return asked.fps if asked.fps is not None and 1 <= asked.fps <= MAX_FPS else defaults.fps


def _num_frames(seconds: str | float, fps: int) -> int:
    try:
        length_s = float(seconds)
    except (ValueError, OverflowError):
        length_s = math.nan
    if not 0 < length_s <= MAX_FRAMES:  # as at least one frame a second is played; nan fails too
        raise InvalidRequest(
            f"seconds {seconds!r:.100}: must be a number above 0 and at most {MAX_FRAMES}", param="seconds"
        )
    num_frames = round(length_s * fps)
    if not 1 <= num_frames <= MAX_FRAMES:
        raise InvalidRequest(
            f"seconds {seconds} at {fps} fps is {num_frames} frames: must be from 1 to {MAX_FRAMES} frames",
            param="seconds",
        )
    return num_frames


def _as_spelt(error: InvalidRequest, asked: SyncVideo) -> InvalidRequest:
    """The error with the name of the field that the caller wrote: of a size, the core knows two sides."""
    if error.param in ("width", "height") and asked.size is not None:
        return InvalidRequest(f"size {asked.size}: {error}", param="size")
    return error
