"""The HTTP API: one table of its routes. Each takes its parts from `app.state.parts`, which whoever serves it fills."""

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from serve_app import videos
from serve_app.cross_site import refuse_other_sites
from serve_app.document import body, describe, errors, event_stream, files, made_now, polled
from serve_app.failures import answer_errors
from serve_app.parts import ApiParts, Finished, Limits, Owner, Parts
from serve_app.schemas import (
    CreateVideo,
    EditVideo,
    Health,
    ModelList,
    ModelObject,
    Readiness,
    RemixVideo,
    SyncVideo,
)

__all__ = ["ApiParts", "Finished", "Limits", "create_app"]

_STATIC = Path(__file__).parent / "static"
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
}


def create_app() -> FastAPI:
    """The app. It answers 503 until `app.state.parts` holds an ApiParts."""
    app = FastAPI(
        title="t2v",
        version=_version(),
        description="Text to video: the `/v1/videos` that OpenAI's clients speak, and what it lacks.",
        docs_url=None,  # these two load scripts from elsewhere
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    answer_errors(app)
    _add_videos(app)
    _add_service(app)
    app.mount("/static", StaticFiles(directory=_STATIC))
    describe(app, CreateVideo, SyncVideo, EditVideo, RemixVideo)
    return app


def _version() -> str:
    """Of the package. Its source alone, which a `working_dir` of Ray brings without installing it, has none."""
    try:
        return version("t2v-serve")
    except PackageNotFoundError:
        return "unknown"


def _add_videos(app: FastAPI) -> None:
    all_videos, one_video = "/v1/videos", "/v1/videos/{video_id}"
    making = errors(400, 403, 413, 415, 429)
    queueing = polled() | making | errors(422)
    reading = errors(400, 404, 409)

    add = app.add_api_route
    change = partial(add, dependencies=[Depends(refuse_other_sites)])
    # Before {video_id}, which would take "sync" for an id.
    change(
        f"{all_videos}/sync",
        videos.make_video_now,
        methods=["POST"],
        response_class=Response,
        responses=made_now() | making,
        openapi_extra=body(SyncVideo),
    )
    change(
        f"{all_videos}/edits",
        videos.edit_video,
        methods=["POST"],
        responses=queueing | errors(404),
        openapi_extra=body(EditVideo, file="video"),
    )
    change(
        all_videos,
        videos.create_video,
        methods=["POST"],
        responses=queueing,
        openapi_extra=body(CreateVideo),
    )
    add(all_videos, videos.list_videos, methods=["GET"], responses=errors(400, 404))
    add(one_video, videos.get_video, methods=["GET"], responses=polled() | errors(404))
    change(one_video, videos.delete_video, methods=["DELETE"], responses=errors(403, 404, 409))
    change(f"{one_video}/cancel", videos.cancel_video, methods=["POST"], responses=errors(403, 404, 409))
    change(
        f"{one_video}/remix",
        videos.remix_video,
        methods=["POST"],
        responses=queueing | errors(404),
        openapi_extra=body(RemixVideo, multipart=False),
    )
    content = f"{one_video}/content"
    add(
        content,
        videos.video_content,
        methods=["GET"],
        response_class=Response,
        responses=files(with_body=True) | reading | errors(416),
    )
    add(
        content,
        videos.video_content,
        methods=["HEAD"],
        name="video_content_headers",
        response_class=Response,
        responses=files(with_body=False) | reading,
    )
    add(
        f"{one_video}/events",
        videos.video_events,
        methods=["GET"],
        response_class=Response,
        responses=event_stream() | errors(404, 429),
        dependencies=[Depends(videos.watch)],
    )


def _add_service(app: FastAPI) -> None:
    add = app.add_api_route
    add("/v1/models", _list_models, methods=["GET"], responses=errors())
    add("/healthz", _is_alive, methods=["GET"])
    add(
        "/readyz",
        _is_ready,
        methods=["GET"],
        response_model=Readiness,
        responses={503: {"model": Readiness, "description": "Some part cannot work"}},
    )
    add("/", _page, methods=["GET"], include_in_schema=False)


async def _list_models(parts: Parts, owner: Owner) -> ModelList:
    """The checkpoints that are served."""
    return ModelList(data=[ModelObject(id=model) for model in parts.models])


async def _is_alive() -> Health:
    """Whether the process answers."""
    return Health()


async def _is_ready(request: Request) -> Response:
    """Whether the service can take work, and each part of it."""
    parts = getattr(request.app.state, "parts", None)
    ready = await parts.is_ready() if isinstance(parts, ApiParts) else {}
    readiness = Readiness(ready=bool(ready) and all(ready.values()), parts=ready)
    return JSONResponse(readiness.model_dump(), 200 if readiness.ready else 503)


async def _page() -> FileResponse:
    """The web page."""
    return FileResponse(_STATIC / "index.html", headers=_PAGE_HEADERS)
