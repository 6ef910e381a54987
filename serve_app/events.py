"""Telling what happens to a job as it happens: one reader of the store for all who watch, and the events they get."""

import asyncio
import base64
import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast, get_args

from sse_starlette import ServerSentEvent

from serve_app.artifacts import ArtifactStore
from serve_app.errors import ArtifactGone, Unavailable
from serve_app.jobs.model import ENDED, Job, JobStatus, Removed
from serve_app.jobs.store import JobStore
from serve_app.schemas import video_object

logger = logging.getLogger(__name__)

EventName = Literal["queued", "progress", "preview", "resumed", "completed", "failed", "cancelled"]


class Seen(NamedTuple):
    """What a watcher knows of a job. It is the id of an event, so that a reconnect goes on behind it."""

    status: JobStatus
    step: int = -1
    preview_step: int = 0
    resumes: int = 0
    position: int | None = None

    @classmethod
    def of(cls, job: Job, position: int | None) -> "Seen":
        return cls(job.status, job.step, job.preview_step, job.resumes, position)

    @classmethod
    def parse(cls, event_id: str | None) -> "Seen | None":
        """What the id says, or None for an id that is none of ours."""
        status, *numbers = (event_id or "").split(".")
        if status not in get_args(JobStatus) or len(numbers) != 4:
            return None
        try:
            step, preview_step, resumes = (int(number) for number in numbers[:3])
            position = int(numbers[3]) if numbers[3] else None
        except ValueError:
            return None
        return cls(cast(JobStatus, status), step, preview_step, resumes, position)

    def __str__(self) -> str:
        return ".".join("" if value is None else str(value) for value in self)


class Event(NamedTuple):
    """Something new, and what a watcher knows with it."""

    name: EventName
    seen: Seen


def news(seen: Seen | None, now: Seen) -> list[Event]:
    """The events between what a watcher knows, None for nothing, and what is. States in between may be left out."""
    if now.status in ENDED:
        return [] if seen is not None and seen.status == now.status else [Event(cast(EventName, now.status), now)]
    known = seen or Seen("queued", resumes=now.resumes)  # how often it went on before is no news to a newcomer
    if now.status == "queued":
        is_new = seen is None or seen.status != "queued" or now.position not in (None, seen.position)
        # That it will go on is told when it does.
        return [Event("queued", now._replace(resumes=known.resumes))] if is_new else []
    events = []
    if now.resumes > known.resumes:
        known = known._replace(resumes=now.resumes, position=None)
        events.append(Event("resumed", known))
    if now.step != known.step or known.status != "in_progress":
        known = known._replace(status="in_progress", step=now.step, position=None)
        events.append(Event("progress", known))
    if now.preview_step not in (0, known.preview_step):
        known = known._replace(preview_step=now.preview_step)
        events.append(Event("preview", known))
    return events


async def job_events(
    watcher: "Watcher", artifacts: ArtifactStore, job_id: str, seen: Seen | None
) -> AsyncIterator[ServerSentEvent]:
    """The events of a job behind what was seen, until its last one or until it is removed."""
    async with aclosing(watcher.subscribe(job_id)) as sightings:
        async for job, position in sightings:
            for name, known in news(seen, Seen.of(job, position)):
                seen = known
                if (data := await _data(name, job, position, artifacts)) is not None:
                    yield ServerSentEvent(data, event=name, id=str(known), sep="\n")
            if job.is_ended:
                return


async def _data(name: EventName, job: Job, position: int | None, artifacts: ArtifactStore) -> str | None:
    if name == "queued":
        return json.dumps({"position": position})
    if name == "progress":
        return json.dumps({"step": job.step, "num_steps": job.num_steps, "eta_s": job.eta_s, "progress": job.progress})
    if name == "resumed":
        return json.dumps({"step": job.checkpoint_step, "resumes": job.resumes})
    if name == "preview":
        # In the event itself, as a picture that has its own URL would need the bearer header.
        with suppress(ArtifactGone, Unavailable):
            if job.preview_path is None:
                return None
            picture = base64.b64encode(await artifacts.read(job.preview_path)).decode()
            return json.dumps({"step": job.preview_step, "url": f"data:image/webp;base64,{picture}"})
        return None
    # In ASCII: what readers take for the end of a line differs, and pydantic's own leaves U+2028 as it is.
    return json.dumps(video_object(job).model_dump(mode="json"))


class Sighting(NamedTuple):
    """A job as it was read, and its place in the queue while it has one."""

    job: Job
    position: int | None


_Mailbox = asyncio.Queue[Sighting | Removed | None]  # of one place: the latest; None ends the subscription


@dataclass(slots=True)
class _Watched:
    """A job that somebody watches: who does, and what they were told last."""

    mailboxes: set[_Mailbox]
    last: Sighting | None = None


class Watcher:
    """Reads all watched jobs at once, every `every_s`, and hands each to those who watch it when it has changed.

    It reads only while somebody watches. Its owner closes it. A subscription ends after `longest_s`: a replica that is
    to be replaced lives for as long as somebody listens to it, and whoever listens asks for the rest.
    """

    def __init__(
        self, jobs: JobStore, *, every_s: float = 0.25, positions_every_s: float = 1.0, longest_s: float = 60.0
    ) -> None:
        self._jobs = jobs
        self._longest_s = longest_s
        self._every_s = every_s
        self._positions_every_s = positions_every_s
        self._watched: dict[str, _Watched] = {}
        self._positions: dict[str, int] = {}
        self._positions_s, self._positions_lock = -math.inf, asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_watched(self) -> int:
        """How many jobs somebody watches."""
        return len(self._watched)

    async def position(self, job_id: str) -> int | None:
        """A job's place in the queue, not long ago; None if it does not wait. One query tells those of all who ask."""
        clock = asyncio.get_running_loop().time
        async with self._positions_lock:
            if job_id not in self._positions or clock() > self._positions_s + self._positions_every_s:
                self._positions, self._positions_s = await self._jobs.queue_positions(), clock()
        return self._positions.get(job_id)

    async def subscribe(self, job_id: str) -> AsyncGenerator[Sighting, None]:
        """The job as it is now, and again whenever it changes, until it is removed, or for so long. Raises JobNotFound.

        A slow reader misses states in between, never the latest, and not the end of a job that was removed at once.
        """
        ends_s = asyncio.get_running_loop().time() + self._longest_s
        job = await self._jobs.get(job_id)
        sighting = Sighting(job, await self.position(job_id) if job.status == "queued" else None)
        mailbox: _Mailbox = asyncio.Queue(maxsize=1)  # from here on, or what was read before would come after this
        watched = self._watched.setdefault(job_id, _Watched(set()))
        watched.mailboxes.add(mailbox)
        watched.last = None
        if self._task is None:
            self._task = asyncio.create_task(self._read_on())
        try:
            yield sighting
            while (told := await _told(mailbox, ends_s)) is not None:
                if isinstance(told, Removed):
                    if not job.is_ended:
                        yield Sighting(replace(job, eta_s=None, **told._asdict()), None)
                    return
                job = told.job
                yield told
        finally:
            watched.mailboxes.discard(mailbox)
            if not watched.mailboxes and self._watched.get(job_id) is watched:
                del self._watched[job_id]

    async def close(self) -> None:
        """Stop reading, and end all subscriptions."""
        for watched in self._watched.values():
            for mailbox in watched.mailboxes:
                _replace(mailbox, None)
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _read_on(self) -> None:
        while self._watched:
            try:
                await self._read()
            except Unavailable:
                pass  # the store has said so; the watchers keep what they know, and are told when it is back
            except Exception:
                logger.exception("cannot read the watched jobs")
            await asyncio.sleep(self._every_s)
        self._task = None

    async def _read(self) -> None:
        # Watchers come and go at any await. Who comes during the read may have read newer rows by then: they are
        # told by the next one.
        asked = {job_id: frozenset(watched.mailboxes) for job_id, watched in self._watched.items()}
        jobs = await self._jobs.get_many(asked.keys())
        removed = await self._jobs.removed(asked.keys() - jobs.keys())
        for job_id, mailboxes in asked.items():
            watched = self._watched.get(job_id)
            job = jobs.get(job_id)
            if watched is None:
                continue
            if job is None:
                for mailbox in mailboxes:
                    if not mailbox.full():  # what was seen last comes first
                        mailbox.put_nowait(removed.get(job_id))
                continue
            sighting = Sighting(job, await self.position(job_id) if job.status == "queued" else None)
            if sighting != watched.last:
                for mailbox in mailboxes:
                    _replace(mailbox, sighting)
            watched.last = sighting if watched.mailboxes <= mailboxes else None


async def _told(mailbox: _Mailbox, until_s: float) -> Sighting | Removed | None:
    try:
        async with asyncio.timeout_at(until_s):
            return await mailbox.get()
    except TimeoutError:
        return None


def _replace(mailbox: _Mailbox, sighting: Sighting | None) -> None:
    if mailbox.full():
        mailbox.get_nowait()
    mailbox.put_nowait(sighting)
