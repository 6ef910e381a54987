"""The routes of /v1/videos: validate, ask the store, answer."""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal, TypeVar
from urllib.parse import quote

from fastapi import Header, Query, Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse
from starlette.requests import ClientDisconnect
from torch import Tensor

from serve_app import inputs
from serve_app.bodies import Upload, read_body
from serve_app.content import content_response
from serve_app.errors import ArtifactGone, IdempotencyConflict, JobEnded, JobLive, JobNotFound, QueueFull, Unavailable
from serve_app.events import Seen, job_events, news
from serve_app.job_logs import name_job
from serve_app.jobs.model import Job, NewJob
from serve_app.parts import ApiParts, Owner, Parts
from serve_app.requests import generation_params, new_job, parse, remixed_params
from serve_app.schemas import (
    CreateVideo,
    DeletedVideo,
    EditVideo,
    RemixVideo,
    SyncVideo,
    Variant,
    VideoList,
    VideoObject,
    video_object,
)
from serve_app.sizes import check_size
from t2v_core.errors import InvalidRequest
from t2v_core.params import GenerationParams

logger = logging.getLogger(__name__)

_POLL_AFTER_MS = "500"  # the openai client keeps the first it gets, and sleeps so long between two looks
_STOP_WITHIN_S = 10.0  # how long DELETE waits for a live job to stop; a step of the largest request is shorter
_LOOK_EVERY_S = 0.05

_Result = TypeVar("_Result")
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="The same key with the same body gives the job that is there already; with another body, 422.",
    ),
]
LastEventID = Annotated[str | None, Header(alias="Last-Event-ID", description="The id of the last event received.")]


async def create_video(
    request: Request, response: Response, parts: Parts, owner: Owner, idempotency_key: IdempotencyKey = None
) -> VideoObject:
    """Queue a video. It is kept from here on: it ends as completed, failed or cancelled, whatever dies."""
    asked = parse(CreateVideo, await read_body(request, parts.limits.max_body_bytes))
    model = _served(asked.model, parts)
    if asked.webhook_url is not None:
        parts.check_webhook(asked.webhook_url)
    params = generation_params(asked, parts.defaults, size_limit=parts.size_limit())
    new = new_job(params, owner=owner, model=model, asked=asked, idempotency_key=idempotency_key)
    return await _accept(new, parts, response)


async def edit_video(
    request: Request, response: Response, parts: Parts, owner: Owner, idempotency_key: IdempotencyKey = None
) -> VideoObject:
    """Queue a video that is made of another one: a file that is sent along, or a completed video."""
    with parts.uploading.one(owner):
        return await _edit(request, response, parts, owner, idempotency_key)


async def _edit(
    request: Request, response: Response, parts: ApiParts, owner: str, idempotency_key: str | None
) -> VideoObject:
    limits = parts.limits
    body = await read_body(request, limits.max_body_bytes, max_upload_bytes=limits.max_upload_bytes)
    sent = body.values.get("video")
    upload = sent if isinstance(sent, Upload) else None
    if upload is not None:
        body = replace(body, values={name: value for name, value in body.values.items() if name != "video"})
    asked = parse(EditVideo, body)
    model = _served(asked.model, parts)
    if asked.webhook_url is not None:
        parts.check_webhook(asked.webhook_url)
    if upload is not None:
        data = upload.data
    elif asked.video is not None:
        data = await _video_of(asked.video.id, parts, owner)
    else:
        raise InvalidRequest('video is missing: send a file, or {"id": "video_..."} of a completed one', param="video")
    size_limit, max_video_bytes = parts.size_limit(), limits.max_upload_bytes

    def resolved() -> tuple[GenerationParams, str]:
        params = generation_params(
            asked, parts.defaults, size_limit=size_limit, video=data, max_video_bytes=max_video_bytes
        )
        return params, hashlib.sha256(data).hexdigest()

    params, digest = await parts.read(resolved)
    new = new_job(params, owner=owner, model=model, asked=asked, input_hash=digest, idempotency_key=idempotency_key)
    return await _accept(new, parts, response, frames=params.video)


async def remix_video(
    video_id: str,
    request: Request,
    response: Response,
    parts: Parts,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
) -> VideoObject:
    """Queue a video with the seed and the settings of another one, and another prompt."""
    earlier = await parts.jobs.get(video_id, owner)
    asked = parse(RemixVideo, await read_body(request, parts.limits.max_body_bytes, multipart=False))
    if earlier.model not in parts.models:
        raise InvalidRequest(
            f"video {video_id}: was made by {earlier.model}, which is not served here; make a new one", param="video_id"
        )
    with parts.uploading.one(owner) if earlier.is_edit else nullcontext():
        frames = await _input_of(earlier, parts) if earlier.is_edit else None
        params = remixed_params(earlier, asked.prompt, parts.defaults, frames)
        check_size(params, parts.size_limit())
        new = new_job(params, owner=owner, model=earlier.model, remix_of=earlier, idempotency_key=idempotency_key)
        return await _accept(new, parts, response, frames=frames)


async def make_video_now(request: Request, parts: Parts, owner: Owner) -> Response:
    """Make a video and answer with the file. Going away cancels it."""
    asked = parse(SyncVideo, await read_body(request, parts.limits.max_body_bytes))
    model = _served(asked.model, parts)
    params = generation_params(asked, parts.defaults, size_limit=parts.size_limit())
    with parts.callers.one(owner):
        finished = await _unless_disconnected(request, parts.generate(params, owner))
    headers = {
        "x-t2v-seed": str(finished.seed),
        "x-t2v-model": quote(model, safe="/:@ "),  # it may be a folder's name, in any letters
        "x-t2v-size": f"{params.width}x{params.height}",
        "x-t2v-num-frames": str(params.num_frames),
        "x-t2v-fps": str(params.fps),
        "content-disposition": f'inline; filename="video.{params.format}"',
        "x-content-type-options": "nosniff",
    }
    return Response(finished.video, headers=headers, media_type=finished.media_type)


async def list_videos(
    parts: Parts,
    owner: Owner,
    after: Annotated[
        str | None, Query(description="The id of the last video of the page before; it may be gone.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
) -> VideoList:
    """The caller's videos, a page at a time."""
    page = await parts.jobs.list(owner, after=after, limit=limit, order=order)
    videos = [video_object(job) for job in page.jobs]
    return VideoList(
        data=videos,
        has_more=page.has_more,
        first_id=videos[0].id if videos else None,
        last_id=videos[-1].id if videos else None,
    )


async def get_video(video_id: str, response: Response, parts: Parts, owner: Owner) -> VideoObject:
    """One video: its state, how far it is, and its place in the queue."""
    job = await parts.jobs.get(video_id, owner)
    response.headers["openai-poll-after-ms"] = _POLL_AFTER_MS
    return video_object(job, await parts.watcher.position(video_id) if job.status == "queued" else None)


async def delete_video(video_id: str, parts: Parts, owner: Owner) -> DeletedVideo:
    """Remove a video and its files. One that has not ended is cancelled first."""
    try:
        await parts.jobs.delete(video_id, owner)
    except JobLive:
        await _stop(video_id, parts, owner)
        await parts.jobs.delete(video_id, owner)
    name_job(video_id)
    logger.info("job deleted: job=%s", video_id)
    # The row first: files that no row names are swept away, a row without its files would be a broken promise.
    await _remove_files(video_id, parts)
    return DeletedVideo(id=video_id)


async def cancel_video(video_id: str, parts: Parts, owner: Owner) -> VideoObject:
    """Stop a video: at once while it is queued, at its next step while it is made."""
    job = await parts.jobs.cancel(video_id, owner)
    name_job(job.id)
    logger.info("cancel accepted: job=%s status=%s", job.id, job.status)
    await parts.wake()
    if job.is_ended and job.is_edit:  # its input now, as who edits and cancels all the time is held up by no bound
        await _remove_files(job.id, parts)
    return video_object(job)


async def video_content(
    video_id: str, request: Request, parts: Parts, owner: Owner, variant: Variant = "video"
) -> Response:
    """The file of a completed video, or a range of it."""
    return await content_response(request, parts.artifacts, await parts.jobs.get(video_id, owner), variant)


async def watch(parts: Parts, owner: Owner) -> AsyncIterator[None]:
    """Be one of those who listen, until the answer has ended. Raises QueueFull."""
    with parts.watching.one(owner):
        yield


async def video_events(video_id: str, parts: Parts, owner: Owner, last_event_id: LastEventID = None) -> Response:
    """What happens to a video, as Server-Sent Events that end with its last state. Closing the stream cancels nothing.

    `queued` {position}, `progress` {step, num_steps, eta_s, progress}, `preview` {step, url}, `resumed` {step,
    resumes}; `completed`, `failed` and `cancelled` hold the video object.
    """
    job = await parts.jobs.get(video_id, owner)
    seen = Seen.parse(last_event_id)
    if job.is_ended and not news(seen, Seen.of(job, None)):
        return Response(status_code=204)  # which tells an EventSource to stay away
    return EventSourceResponse(job_events(parts.watcher, parts.artifacts, video_id, seen), sep="\n")


def _served(model: str | None, parts: ApiParts) -> str:
    if model is None:
        return parts.models[0]
    if model not in parts.models:
        raise InvalidRequest(
            f"model {model!r:.100}: is not served here; leave it out, or use {', '.join(parts.models)}", param="model"
        )
    return model


async def _video_of(video_id: str, parts: ApiParts, owner: str) -> bytes:
    try:
        job = await parts.jobs.get(video_id, owner)
    except JobNotFound as error:
        raise JobNotFound(str(error), param="video") from error
    if job.status != "completed":
        raise InvalidRequest(f"video {video_id}: is {job.status}; wait until it is completed", param="video")
    return await parts.artifacts.read(job.artifacts["video"].path)


async def _input_of(edit: Job, parts: ApiParts) -> Tensor:
    """The frames that a video was made of. Raises ArtifactGone."""
    if edit.input_path is None:
        raise ArtifactGone(f"video {edit.id}: is {edit.status}, so its input is gone; edit that video again")
    return await parts.read(partial(inputs.frames_of, await parts.artifacts.read(edit.input_path)))


async def _accept(new: NewJob, parts: ApiParts, response: Response, *, frames: Tensor | None = None) -> VideoObject:
    """The input first: a row without its files would be a broken promise."""
    limits = parts.limits
    new = replace(new, **parts.origin()._asdict())
    if frames is not None:
        assert new.input_path is not None
        data = await parts.read(partial(inputs.to_bytes, frames))
        await parts.artifacts.put(new.input_path, data, inputs.MEDIA_TYPE)
    try:
        job, is_new = await parts.jobs.create(
            new, max_queued=limits.max_queued, max_queued_per_owner=limits.max_queued_per_owner
        )
    except (QueueFull, IdempotencyConflict, InvalidRequest):
        await _remove_input(new, parts)
        raise  # after any other error, as when the client goes away, the row may be there: the sweeper looks
    if not is_new:
        await _remove_input(new, parts)
    name_job(job.id)
    logger.info("job accepted: job=%s priority=%s is_new=%s request=%s", job.id, job.priority, is_new, new.request_id)
    await parts.wake()
    response.headers["openai-poll-after-ms"] = _POLL_AFTER_MS
    return video_object(job)


async def _remove_input(new: NewJob, parts: ApiParts) -> None:
    """Of a request that became no job."""
    if new.input_path is not None:
        await _remove_files(new.id, parts)


async def _remove_files(job_id: str, parts: ApiParts) -> None:
    """Of a job that has no row, or whose row names none. While the store is away, they are left to the sweeper."""
    try:
        await parts.artifacts.delete_prefix(f"{job_id}/")
    except Unavailable as error:
        logger.warning("files not removed yet: job=%s error=%s", job_id, error)


async def _stop(job_id: str, parts: ApiParts, owner: str) -> None:
    """Cancel a job, and wait until it has ended. Raises JobLive when it does not in time."""
    try:
        job: Job = await parts.jobs.cancel(job_id, owner)
    except JobEnded:
        return
    await parts.wake()
    clock = asyncio.get_running_loop().time
    deadline = clock() + _STOP_WITHIN_S
    while not job.is_ended:
        if clock() > deadline:
            raise JobLive(f"video {job_id} is cancelled but has not stopped yet: delete it again in a few seconds")
        await asyncio.sleep(_LOOK_EVERY_S)
        job = await parts.jobs.get(job_id, owner)


async def _unless_disconnected(request: Request, work: Awaitable[_Result]) -> _Result:
    """What the work gives. It is cancelled as soon as the client goes away, and when we are cancelled ourselves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
