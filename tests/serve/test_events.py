"""Events: what is news, and how it comes over the wire."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, nullcontext
from typing import Any

import pytest
from api_service import error_of
from hypothesis import given
from hypothesis import strategies as st
from sse_starlette import EventSourceResponse

from serve_app.bounds import Callers
from serve_app.errors import JobNotFound
from serve_app.events import Event, Seen, Watcher, job_events, news
from serve_app.jobs.store import JobStore

pytestmark = pytest.mark.anyio

STATES = st.builds(
    Seen,
    status=st.sampled_from(["queued", "in_progress", "completed", "failed", "cancelled"]),
    step=st.integers(0, 5),
    preview_step=st.integers(0, 5),
    resumes=st.integers(0, 2),
    position=st.none() | st.integers(0, 3),
)


def names(seen: Seen | None, now: Seen) -> list[str]:
    return [event.name for event in news(seen, now)]


@given(STATES)
def test_an_id_says_what_was_seen(state: Seen) -> None:
    assert Seen.parse(str(state)) == state


@pytest.mark.parametrize(
    "text", [None, "", "queued", "done.1.2.3.4", "queued.1.2.3", "queued.a.b.c.d", "queued.1.2.3.4.5"]
)
def test_an_id_that_is_none_of_ours_means_nothing_was_seen(text: str | None) -> None:
    assert Seen.parse(text) is None


@given(st.none() | STATES, STATES)
def test_what_was_told_is_not_told_again(seen: Seen | None, now: Seen) -> None:
    for event in news(seen, now):
        seen = event.seen
    assert news(seen, now) == []


@given(st.none() | STATES, STATES, st.integers(0, 3))
def test_who_reconnects_after_any_event_gets_just_the_others(seen: Seen | None, now: Seen, num_received: int) -> None:
    events = news(seen, now)
    for event in events[:num_received]:
        seen = Seen.parse(str(event.seen))
    assert news(seen, now) == events[num_received:]


def test_states_are_told_in_words() -> None:
    assert names(None, Seen("queued", 0, position=2)) == ["queued"]
    assert names(Seen("queued", 0, position=2), Seen("queued", 0, position=1)) == ["queued"]
    assert names(Seen("queued", 0, position=2), Seen("queued", 0)) == []
    assert names(Seen("queued", 0, position=0), Seen("in_progress", 0)) == ["progress"]
    assert names(Seen("in_progress", 3), Seen("in_progress", 4, preview_step=4)) == ["progress", "preview"]
    assert names(Seen("in_progress", 4), Seen("queued", 4, resumes=1)) == ["queued"]
    assert names(Seen("in_progress", 4), Seen("in_progress", 3, resumes=1)) == ["resumed", "progress"]
    assert names(None, Seen("in_progress", 3, resumes=1)) == ["progress"]
    assert news(Seen("in_progress", 4), Seen("completed", 5)) == [Event("completed", Seen("completed", 5))]


async def events_of(service: Any, video_id: str, last_event_id: str | None = None) -> AsyncIterator[dict[str, Any]]:
    headers = {"last-event-id": last_event_id} if last_event_id is not None else {}
    async with service.client.stream("GET", f"/v1/videos/{video_id}/events", headers=headers) as response:
        assert response.status_code == 200, response.status_code
        assert response.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        async for line in response.aiter_lines():
            if not line:
                if event:
                    yield event
                event = {}
            elif not line.startswith(":"):
                name, _, value = line.partition(": ")
                event[name] = json.loads(value) if name == "data" else value


async def test_a_video_is_told_from_the_queue_to_its_end(service: Any, files: Any) -> None:
    first, video = await service.create(), await service.create()
    stream = events_of(service, video["id"])
    assert await anext(stream) == {"id": "queued.0.0.0.1", "event": "queued", "data": {"position": 1}}
    await service.client.post(f"/v1/videos/{first['id']}/cancel")
    assert (await anext(stream))["data"] == {"position": 0}
    work = await service.claim()
    assert (await anext(stream))["data"] == {"step": 0, "num_steps": 5, "eta_s": None, "progress": 0}
    work.eta_s = 1.5
    await work.step(2, preview=files.thumbnail)
    progress, preview = await anext(stream), await anext(stream)
    assert (progress["event"], progress["data"]["step"], progress["data"]["eta_s"]) == ("progress", 2, 1.5)
    assert (preview["event"], preview["data"]["step"]) == ("preview", 2)
    assert preview["data"]["url"].startswith("data:image/webp;base64,UklGR")
    await work.complete()
    rest = [event async for event in stream]
    assert [event["event"] for event in rest] == ["completed"]
    assert rest[0]["data"] == (await service.client.get(f"/v1/videos/{video['id']}")).json()


async def test_an_event_is_ascii_so_that_nothing_in_a_prompt_ends_a_line_of_it(service: Any) -> None:
    prompt = "a\u2028b\u2029c\x85d\x0be\r\nf"
    video = await service.create(prompt)
    await (await service.claim()).complete()
    response = await service.client.get(f"/v1/videos/{video['id']}/events")
    assert response.content.isascii()
    (data,) = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert json.loads(data.removeprefix("data: "))["prompt"] == prompt


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_the_last_event_says_how_it_ended(service: Any, end: str) -> None:
    video = await service.create()
    work = await service.claim()
    stream = events_of(service, video["id"])
    assert (await anext(stream))["event"] == "progress"
    await service.client.post(f"/v1/videos/{video['id']}/cancel")
    await (work.fail() if end == "failed" else work.cancelled())
    rest = [event async for event in stream]
    assert [event["event"] for event in rest] == [end]
    assert rest[0]["data"]["status"] == end


async def test_a_video_that_goes_on_elsewhere_is_resumed(service: Any) -> None:
    video = await service.create()
    work = await service.claim()
    await work.step(4)
    stream = events_of(service, video["id"])
    assert (await anext(stream))["data"]["step"] == 4
    assert await service.jobs.save_checkpoint(video["id"], work.job.fence, "somewhere", 3)
    await service.jobs.retry(video["id"], work.job.fence, "the worker was lost")
    assert (await anext(stream))["event"] == "queued"
    await service.claim()
    resumed = await anext(stream)
    assert (resumed["event"], resumed["data"]) == ("resumed", {"step": 3, "resumes": 1})
    await stream.aclose()


async def test_a_reconnect_gets_what_is_new_and_nothing_twice(service: Any) -> None:
    video = await service.create()
    work = await service.claim()
    await work.step(1)
    async with aclosing(events_of(service, video["id"])) as stream:
        first = await anext(stream)
    async with aclosing(events_of(service, video["id"], first["id"])) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        assert not (await asyncio.wait([waiting], timeout=0.2))[0]
        await work.step(2)
        second = await waiting
    assert (first["data"]["step"], second["data"]["step"]) == (1, 2)
    await work.complete()
    assert [event["event"] async for event in events_of(service, video["id"], second["id"])] == ["completed"]


async def test_who_has_seen_the_end_is_told_to_stay_away(service: Any) -> None:
    video = await service.completed()
    (end,) = [event async for event in events_of(service, video["id"])]
    response = await service.client.get(f"/v1/videos/{video['id']}/events", headers={"last-event-id": end["id"]})
    assert response.status_code == 204


async def test_one_key_may_not_listen_to_as_much_as_there_is_room_for(service: Any) -> None:
    parts = service.app.state.parts
    watching = Callers(2, 1, what="event streams", most_retry_after_s=5.0)
    service.app.state.parts = dataclasses.replace(parts, watching=watching)
    video = await service.create()
    url = f"/v1/videos/{video['id']}/events"
    async with aclosing(events_of(service, video["id"])) as stream:
        await anext(stream)
        refused = await service.client.get(url)
        assert "1 event streams of this key" in error_of(refused, 429)["message"]
        assert refused.headers["retry-after"] == "5"
    await service.client.post(f"/v1/videos/{video['id']}/cancel")
    async with asyncio.timeout(5):
        while (response := await service.client.get(url)).status_code == 429:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.02)
    assert "event: cancelled" in response.text
    assert (await service.client.get(url)).status_code == 200  # an answer that has ended leaves its place


async def test_closing_the_stream_cancels_nothing_and_stops_the_reader(service: Any) -> None:
    video = await service.create()
    await service.claim()
    async with aclosing(events_of(service, video["id"])) as stream:
        await anext(stream)
        assert service.watcher.num_watched == 1
    for _ in range(100):
        await asyncio.sleep(0.02)
        if service.watcher.num_watched == 0:
            break
    assert service.watcher.num_watched == 0
    job = await service.jobs.get(video["id"])
    assert job.status == "in_progress"
    assert not job.cancel_requested


@pytest.mark.parametrize("is_running", [True, False])
async def test_a_video_that_is_removed_while_it_lives_ends_as_cancelled(service: Any, is_running: bool) -> None:
    video = await service.create()
    async with service.working(step_s=0.5) if is_running else nullcontext():
        stream = events_of(service, video["id"])
        while (await anext(stream))["event"] != ("progress" if is_running else "queued"):
            pass
        assert (await service.client.delete(f"/v1/videos/{video['id']}")).status_code == 200
        *_, last = [event async for event in stream]
    told = last["data"]
    assert (last["event"], told["id"], told["status"], told["eta_s"]) == ("cancelled", video["id"], "cancelled", None)
    assert told["completed_at"] >= told["created_at"]


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_who_watches_is_told_the_true_end_of_a_video_that_was_removed_at_once(service: Any, end: str) -> None:
    video = await service.create()
    work = await service.claim()
    watcher = Watcher(service.jobs, every_s=0.5)
    async with aclosing(watcher.subscribe(video["id"])) as subscription:
        assert (await anext(subscription)).job.status == "in_progress"
        await asyncio.sleep(0.1)  # it has looked, and will in a while
        await {"completed": work.complete, "failed": work.fail, "cancelled": work.cancelled}[end]()
        ended = await service.jobs.delete(video["id"], "local")
        *_, last = [sighting async for sighting in subscription]
    assert (last.job.status, last.job.completed_at) == (end, ended.completed_at)
    await watcher.close()


async def test_a_preview_that_is_gone_is_left_out(service: Any, files: Any) -> None:
    video = await service.create()
    work = await service.claim()
    await work.step(2, preview=files.thumbnail)
    await service.artifacts.delete_prefix(video["id"])
    stream = events_of(service, video["id"])
    assert (await anext(stream))["event"] == "progress"
    await work.complete()
    assert [event["event"] async for event in stream] == ["completed"]


async def test_a_quiet_stream_is_kept_alive_by_comments(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventSourceResponse, "DEFAULT_PING_INTERVAL", 0.05)
    video = await service.create()
    async with service.client.stream("GET", f"/v1/videos/{video['id']}/events") as response:
        async for line in response.aiter_lines():
            if line.startswith(":"):
                break


async def test_the_stream_of_an_unknown_video_is_404(service: Any) -> None:
    response = await service.client.get("/v1/videos/video_0/events")
    assert response.status_code == 404


class Counted:
    """A job store that counts how often it is asked for many jobs."""

    def __init__(self, jobs: JobStore) -> None:
        self.jobs = jobs
        self.num_reads = 0
        self.num_failures = 0

    async def get_many(self, ids: Any) -> Any:
        self.num_reads += 1
        if self.num_failures:
            self.num_failures -= 1
            raise ConnectionError("the database is away")
        return await self.jobs.get_many(ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jobs, name)


async def test_all_who_watch_share_one_reader(service: Any) -> None:
    videos = [await service.create() for _ in range(3)]
    counted = Counted(service.jobs)
    watcher = Watcher(counted, every_s=0.05)  # type: ignore[arg-type]

    async def last_of(video: dict[str, Any]) -> str:
        async with aclosing(watcher.subscribe(video["id"])) as sightings:
            async for job, _ in sightings:
                if job.is_ended:
                    break
        return str(job.status)

    began = time.monotonic()
    watching = [asyncio.create_task(last_of(video)) for video in videos for _ in range(20)]
    for work in [await service.claim() for _ in videos]:
        await asyncio.sleep(0.1)
        await work.complete()
    assert await asyncio.gather(*watching) == ["completed"] * 60
    assert 0 < counted.num_reads <= (time.monotonic() - began) / 0.05 + 1
    await asyncio.sleep(0.1)
    num_reads = counted.num_reads
    await asyncio.sleep(0.2)
    assert counted.num_reads == num_reads, "it reads though nobody watches"
    await watcher.close()


async def test_a_store_that_is_away_for_a_while_ends_no_subscription(service: Any) -> None:
    video = await service.create()
    counted = Counted(service.jobs)
    watcher = Watcher(counted, every_s=0.01)  # type: ignore[arg-type]
    async with aclosing(watcher.subscribe(video["id"])) as subscription:
        await anext(subscription)
        counted.num_failures = 3
        await service.claim()
        async with asyncio.timeout(5):
            sighting = await anext(subscription)
            while sighting.job.status == "queued":
                sighting = await anext(subscription)
        assert sighting.job.status == "in_progress"
    await watcher.close()


async def test_a_slow_reader_misses_states_but_not_the_latest(service: Any) -> None:
    video = await service.create()
    watcher = Watcher(service.jobs, every_s=0.01)
    async with aclosing(watcher.subscribe(video["id"])) as subscription, asyncio.timeout(5):
        await anext(subscription)
        work = await service.claim()
        for step in (1, 2, 3):
            await work.step(step)
            await asyncio.sleep(0.05)
        assert (await anext(subscription)).job.step == 3
    await watcher.close()


class Slow(Counted):
    """A job store whose next answer to a question about many jobs is held back."""

    def __init__(self, jobs: JobStore) -> None:
        super().__init__(jobs)
        self.has_read, self.may_answer = asyncio.Event(), asyncio.Event()
        self.may_answer.set()

    async def get_many(self, ids: Any) -> Any:
        answer = await super().get_many(ids)
        self.has_read.set()
        await self.may_answer.wait()
        return answer


async def test_what_was_read_before_a_reader_came_is_not_told_after_what_it_has_seen(service: Any) -> None:
    video = await service.create()
    work = await service.claim()
    await work.step(1)
    slow = Slow(service.jobs)
    watcher = Watcher(slow, every_s=0.01)  # type: ignore[arg-type]
    async with aclosing(watcher.subscribe(video["id"])) as first, asyncio.timeout(5):
        assert (await anext(first)).job.step == 1
        slow.may_answer.clear()
        slow.has_read.clear()
        await slow.has_read.wait()
        await work.step(3)
        async with aclosing(watcher.subscribe(video["id"])) as second:
            seen = [(await anext(second)).job.step]
            slow.may_answer.set()
            await asyncio.sleep(0.1)
            await work.step(4)
            while seen[-1] != 4:
                seen.append((await anext(second)).job.step)
    assert seen == sorted(seen)
    await watcher.close()


async def test_closing_the_watcher_ends_all_subscriptions(service: Any) -> None:
    video = await service.create()
    watcher = Watcher(service.jobs, every_s=0.01)
    subscription = watcher.subscribe(video["id"])
    await anext(subscription)
    await watcher.close()
    assert [sighting async for sighting in subscription] == []


async def test_a_stream_ends_after_a_while_and_goes_on_where_it_is_asked_for_again(service: Any) -> None:
    video = await service.create()
    work = await service.claim()
    watcher = Watcher(service.jobs, every_s=0.01, longest_s=0.3)
    async with asyncio.timeout(5):
        events = [event async for event in job_events(watcher, service.artifacts, video["id"], None)]
        await work.step(3)
        seen = Seen.parse(events[-1].id)
        events = [event async for event in job_events(watcher, service.artifacts, video["id"], seen)]
    assert [event.event for event in events] == ["progress"]
    assert watcher.num_watched == 0
    await watcher.close()


async def test_watching_an_unknown_job_is_refused(service: Any) -> None:
    with pytest.raises(JobNotFound):
        await anext(service.watcher.subscribe("video_0"))
    assert service.watcher.num_watched == 0
