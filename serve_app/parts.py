"""What the routes work with. Whoever serves the API fills `app.state.parts`."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serve_app.artifacts import ArtifactStore
from serve_app.auth import ApiKeys
from serve_app.bounds import Callers
from serve_app.errors import Unavailable
from serve_app.events import Watcher
from serve_app.jobs.model import Origin
from serve_app.jobs.store import JobStore
from serve_app.sizes import SizeLimit, configured
from t2v_core.config import GenerationDefaults
from t2v_core.params import GenerationParams

_MAX_UPLOADS = 16  # half of them of one key

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the service takes on. None: no limit."""

    max_queued: int | None = 1_000
    max_queued_per_owner: int | None = 100
    max_calls: int | None = 100  # that wait for their video
    max_calls_per_owner: int | None = 20
    max_body_bytes: int = 1 << 20
    max_upload_bytes: int = 64 << 20
    max_pixel_frames: int | None = None  # width x height x num_frames; None: as was measured


@dataclass(frozen=True, slots=True)
class Finished:
    """A video that was made while its caller waited."""

    video: bytes
    media_type: str
    seed: int


@dataclass(frozen=True, slots=True)
class ApiParts:
    """What there is for every request."""

    jobs: JobStore
    artifacts: ArtifactStore
    keys: ApiKeys
    watcher: Watcher
    models: tuple[str, ...]  # ids that are served; the first is the default
    defaults: GenerationDefaults  # of that one's checkpoint
    limits: Limits
    generate: Callable[[GenerationParams, str], Awaitable[Finished]]  # at this owner's turn; cancelling stops the work
    wake: Callable[[], Awaitable[None]]  # tells the Generators of work or of a cancel, and never raises
    is_ready: Callable[[], Awaitable[dict[str, bool]]]  # whether each part of the service can work
    check_webhook: Callable[[str], None]  # raises InvalidRequest for a URL that is not told
    callers: Callers  # whose videos are made while they wait
    origin: Callable[[], Origin]  # where what is asked for right now comes from
    measured_limit: Callable[[], SizeLimit | None]  # what the Denoisers can hold, once they have told
    # Whose input video is held in memory, and be it by Serve, which takes a body in before anybody reads it: so no more
    # of them may wait.
    uploading: Callers = field(
        default_factory=lambda: Callers(_MAX_UPLOADS, _MAX_UPLOADS // 2, what="uploads", most_retry_after_s=5.0)
    )
    watching: Callers = field(default_factory=lambda: Callers(None, None))  # each holds a request that Serve lets in
    # Input videos are decoded and stored in these threads.
    reading: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "reading"))

    def size_limit(self) -> SizeLimit | None:
        """How large a video may be now: the operator's word counts before what was measured."""
        return configured(self.limits.max_pixel_frames) or self.measured_limit()

    async def read(self, work: Callable[[], _Result]) -> _Result:
        """What comes of work on an input video. A thread goes on with that when its caller leaves."""
        return await asyncio.get_running_loop().run_in_executor(self.reading, work)


async def _parts_of(request: Request) -> ApiParts:
    parts = getattr(request.app.state, "parts", None)
    if not isinstance(parts, ApiParts):
        raise Unavailable("the service is starting: try again in a second")
    return parts


Parts = Annotated[ApiParts, Depends(_parts_of)]

_Bearer = HTTPBearer(auto_error=False, scheme_name="bearer", description="An API key, where the service has keys.")


async def _owner_of(
    request: Request, parts: Parts, _declared: Annotated[HTTPAuthorizationCredentials | None, Security(_Bearer)]
) -> str:
    """Whose key the request carries. Raises Unauthorized."""
    return parts.keys.owner_of(request.headers.get("authorization"))


Owner = Annotated[str, Depends(_owner_of)]
