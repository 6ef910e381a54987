"""The typed client, blocking and awaiting, against the real API: every method, every error, and a bad network."""

import asyncio
import functools
import json
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from anyio import to_thread
from api_service import ALICE, BOB, KEYS, UNKNOWN, Service
from dropping_proxy import answer, dropping, event_stream

from serve_app import client as client_package
from serve_app.api import Limits
from serve_app.client import (
    ApiError,
    AsyncClient,
    BadRequest,
    Cancelled,
    Client,
    Completed,
    Conflict,
    ConnectionFailed,
    Failed,
    IdempotencyConflict,
    NotFound,
    Preview,
    Progress,
    Queued,
    RateLimited,
    Resumed,
    ServerError,
    Unauthorized,
    Video,
    VideoSettings,
    calls,
)
from serve_app.client.errors import transport_explained
from serve_app.client.models import Event
from serve_app.events import EventName
from serve_app.jobs.model import JobStatus
from serve_app.schemas import CreateVideo, Variant, VideoObject
from t2v_core.config import SamplerName
from t2v_core.engine import Priority
from t2v_core.media import VideoFormat

pytestmark = pytest.mark.anyio


class Blocking:
    """A Client in a thread, since the service runs in this one."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.client = Client(*arguments, **options)

    async def do(self, method: str, *arguments: Any, **named: Any) -> Any:
        return await to_thread.run_sync(functools.partial(getattr(self.client, method), *arguments, **named))

    async def each(self, method: str, *arguments: Any, **named: Any) -> AsyncIterator[Any]:
        results = getattr(self.client, method)(*arguments, **named)
        while (result := await to_thread.run_sync(next, results, None)) is not None:
            yield result

    async def close(self) -> None:
        self.client.close()


class Awaiting:
    """The same of an AsyncClient."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.client = AsyncClient(*arguments, **options)

    async def do(self, method: str, *arguments: Any, **named: Any) -> Any:
        return await getattr(self.client, method)(*arguments, **named)

    async def each(self, method: str, *arguments: Any, **named: Any) -> AsyncIterator[Any]:
        async for result in getattr(self.client, method)(*arguments, **named):
            yield result

    async def close(self) -> None:
        await self.client.close()


Connect = Callable[..., Any]


@pytest.fixture(params=[Blocking, Awaiting], ids=["Client", "AsyncClient"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        def connected(*arguments: Any, **options: Any) -> Any:
            client = request.param(*arguments, **options)
            stack.push_async_callback(client.close)
            return client

        yield connected


async def all_of(results: AsyncIterator[Any]) -> list[Any]:
    return [result async for result in results]


async def num_videos(service: Service) -> int:
    return len((await service.client.get("/v1/videos")).json()["data"])


# What it says


def test_its_models_say_what_the_service_says() -> None:
    assert Video.model_fields.keys() == VideoObject.model_fields.keys()
    assert VideoSettings.__annotations__.keys() | {"prompt"} == CreateVideo.model_fields.keys()
    assert {get_args(kind.model_fields["event"].annotation)[0] for kind in get_args(Event)} == set(get_args(EventName))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (client_package.Status, JobStatus),
        (client_package.Variant, Variant),
        (client_package.SamplerName, SamplerName),
        (client_package.VideoFormat, VideoFormat),
        (client_package.Priority, Priority),
    ],
)
def test_its_choices_are_those_of_the_service(ours: Any, theirs: Any) -> None:
    assert get_args(ours) == get_args(theirs)


def test_both_clients_have_the_same_methods() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    assert public(Client) == public(AsyncClient) >= {"create", "remix", "download", "events", "wait", "make"}


def test_it_needs_neither_torch_nor_ray() -> None:
    code = "import sys, serve_app.client; print({'torch', 'ray', 'fastapi', 'sqlalchemy'} & sys.modules.keys())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "set()", out.stderr


# Every method


async def test_create_sends_every_setting(service: Service, connect: Connect) -> None:
    settings: VideoSettings = {
        "model": "other",
        "size": "48x64",
        "num_frames": 3,
        "fps": 2,
        "num_inference_steps": 4,
        "guidance_scale": 2.5,
        "sampler": "ddim",
        "seed": 0,
        "negative_prompt": "blue",
        "format": "gif",
        "priority": "low",
        "metadata": {"order": "17"},
    }
    video = await connect(service.url).do("create", "a red circle", **settings, seconds=None)
    assert video.status == "queued"
    assert video.prompt == "a red circle"
    assert {name: getattr(video, name) for name in settings} == settings
    assert (await connect(service.url).do("create", "a", seconds=1.5)).seconds == "1.5"


async def test_retrieve_gives_the_whole_of_what_the_service_says(service: Service, connect: Connect) -> None:
    made = await service.completed(seed=7)
    video = await connect(service.url).do("retrieve", made["id"])
    assert video.model_dump() == made
    assert video.is_ended
    assert (await connect(service.url).do("retrieve", (await service.create())["id"])).queue_position == 0


async def test_list_goes_through_all_pages(service: Service, connect: Connect) -> None:
    ids = [(await service.create())["id"] for _ in range(5)]
    client = connect(service.url)
    for order, expected in [("asc", ids), ("desc", ids[::-1])]:
        assert [video.id async for video in client.each("list", order=order, page_size=2)] == expected
    assert [video.id async for video in client.each("list", order="asc", after=ids[3])] == ids[4:]


async def test_list_goes_on_while_its_videos_are_deleted(service: Service, connect: Connect) -> None:
    ids = {(await service.create())["id"] for _ in range(5)}
    client = connect(service.url)
    deleted = set()
    async for video in client.each("list", page_size=2):
        await client.do("delete", video.id)
        deleted.add(video.id)
    assert deleted == ids


async def test_list_of_nothing_is_empty(service: Service, connect: Connect) -> None:
    assert await all_of(connect(service.url).each("list")) == []


async def test_cancel_and_delete(service: Service, connect: Connect) -> None:
    client = connect(service.url)
    video = await client.do("create", "a")
    assert (await client.do("cancel", video.id)).status == "cancelled"
    await client.do("delete", video.id)
    with pytest.raises(NotFound):
        await client.do("retrieve", video.id)


async def test_remix_takes_seed_and_settings_of_the_other(service: Service, connect: Connect) -> None:
    first = await service.completed(seed=7, num_frames=3)
    remixed = await connect(service.url).do("remix", first["id"], "a blue circle")
    assert (remixed.remixed_from_video_id, remixed.prompt) == (first["id"], "a blue circle")
    assert (remixed.seed, remixed.num_frames) == (7, 3)


@pytest.mark.parametrize("variant", ["video", "thumbnail", "spritesheet"])
async def test_content_and_download_give_each_variant(
    service: Service, connect: Connect, tmp_path: Any, variant: Variant
) -> None:
    video, folder = await service.completed(), tmp_path / "downloads"
    folder.mkdir()
    client, expected = connect(service.url), getattr(service.files, variant)
    assert await client.do("content", video["id"], variant) == expected
    assert await client.do("download", video["id"], folder / "file", variant) == folder / "file"
    assert (folder / "file").read_bytes() == expected
    assert [path.name for path in folder.iterdir()] == ["file"]


async def test_make_gives_the_video_when_it_is_made(service: Service, connect: Connect) -> None:
    async with service.working():
        video = await connect(service.url).do("make", "a red circle", seed=7)
    assert (video.status, video.seed, video.step) == ("completed", 7, 5)


async def test_more_may_watch_than_a_pool_holds_by_default(service: Service) -> None:
    video = await service.create()
    async with AsyncClient(service.url, timeout_s=2, max_retries=0) as client:
        streams = [client.events(video["id"]) for _ in range(101)]
        first = await asyncio.gather(*(anext(events) for events in streams))
        assert {type(event) for event in first} == {Queued}
        assert (await client.cancel(video["id"])).status == "cancelled"
        assert {type(event) for events in streams for event in await all_of(events)} == {Cancelled}


async def test_wait_gives_a_failed_video_and_why(service: Service, connect: Connect) -> None:
    video = await service.create()
    waiting = asyncio.create_task(connect(service.url).do("wait", video["id"]))
    await (await service.claim()).fail()
    failed = await waiting
    assert failed.status == "failed"
    assert (failed.error.code, failed.error.message) == ("generation_failed", "values were not finite")


async def test_events_tell_everything_in_its_type(service: Service, connect: Connect) -> None:
    video = await service.create()
    events = connect(service.url).each("events", video["id"])
    queued = await anext(events)
    work = await service.claim()
    started = await anext(events)
    work.eta_s = 3.0
    await work.step(2, preview=service.files.thumbnail)
    progress, preview = await anext(events), await anext(events)
    await work.complete()
    (completed,) = await all_of(events)
    assert isinstance(queued, Queued)
    assert queued.position == 0
    assert isinstance(started, Progress)
    assert isinstance(progress, Progress)
    assert (progress.step, progress.num_steps, progress.eta_s, progress.progress) == (2, 5, 3.0, 40)
    assert isinstance(preview, Preview)
    assert (preview.step, preview.picture) == (2, service.files.thumbnail)
    assert isinstance(completed, Completed)
    assert (completed.video.id, completed.video.status) == (video["id"], "completed")


async def test_events_of_a_cancelled_video_end_with_that(service: Service, connect: Connect) -> None:
    video = await service.create()
    await service.client.post(f"/v1/videos/{video['id']}/cancel")
    (event,) = await all_of(connect(service.url).each("events", video["id"]))
    assert isinstance(event, Cancelled)


async def test_events_of_a_video_that_is_deleted_end_as_cancelled(service: Service, connect: Connect) -> None:
    client = connect(service.url)
    video = await client.do("create", "a")
    events = client.each("events", video.id)
    assert isinstance(await anext(events), Queued)
    await client.do("delete", video.id)
    assert [type(event) for event in await all_of(events)] == [Cancelled]


async def test_events_of_a_failed_video_end_with_that(service: Service, connect: Connect) -> None:
    video = await service.create()
    await (await service.claim()).fail()
    (event,) = await all_of(connect(service.url).each("events", video["id"]))
    assert isinstance(event, Failed)


async def test_events_go_on_behind_the_one_that_is_named(service: Service, connect: Connect) -> None:
    video = await service.create()
    client = connect(service.url)
    first = await anext(client.each("events", video["id"]))
    await (await service.claim()).complete()
    (last,) = await all_of(client.each("events", video["id"], last_event_id=first.id))
    assert isinstance(last, Completed)
    assert await all_of(client.each("events", video["id"], last_event_id=last.id)) == []


async def test_the_example_of_the_guide_runs(service: Service, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
    (example,) = re.findall(r"```python\n(from serve_app.client .+?)```", guide, flags=re.DOTALL)
    async with service.working():
        await to_thread.run_sync(exec, example.replace("http://127.0.0.1:8000", service.url), {})
    assert (tmp_path / "triangle.mp4").read_bytes() == service.files.video
    printed = capsys.readouterr().out
    assert re.search(r"step [1-5] of 5", printed)  # the last one may be skipped: it has ended then
    assert "completed ['A small green triangle" in printed
    assert "400 invalid_value size size 100x100: width 100: must be" in printed


# Errors


async def raised(doing: Any, kind: type[ApiError]) -> Any:
    with pytest.raises(kind) as caught:
        await doing
    assert type(caught.value) is kind
    assert str(caught.value) == caught.value.message != ""
    return caught.value


async def test_each_refusal_is_an_error_of_its_own(shared_service: Service, connect: Connect) -> None:
    client = connect(shared_service.url)
    error = await raised(client.do("create", "a", size="100x64"), BadRequest)
    assert (error.status, error.code, error.param) == (400, "invalid_value", "size")
    assert "100" in error.message
    error = await raised(client.do("retrieve", UNKNOWN), NotFound)
    assert (error.status, error.code, error.param) == (404, "video_not_found", "video_id")
    error = await raised(all_of(client.each("events", UNKNOWN)), NotFound)
    assert UNKNOWN in error.message
    video = await client.do("create", "a", idempotency_key="the key")
    error = await raised(client.do("content", video.id), Conflict)
    assert (error.status, error.code) == (409, "video_not_ready")
    error = await raised(client.do("create", "b", idempotency_key="the key"), IdempotencyConflict)
    assert (error.status, error.code) == (422, "idempotency_conflict")
    error = await raised(client.do("create", "a" * 64_000), ApiError)
    assert (error.status, error.code) == (413, "request_too_large")


async def test_a_key_is_needed_and_sees_only_its_own(run_service: Any, connect: Connect) -> None:
    service = await run_service(keys=KEYS, key=ALICE)
    video = await connect(service.url, ALICE).do("create", "a")
    error = await raised(connect(service.url).do("retrieve", video.id), Unauthorized)
    assert (error.status, error.code) == (401, "invalid_api_key")
    await raised(connect(service.url, "sk-unknown").do("create", "a"), Unauthorized)
    await raised(connect(service.url, BOB).do("retrieve", video.id), NotFound)


async def test_a_full_queue_says_when_to_come_back(run_service: Any, connect: Connect) -> None:
    service = await run_service(limits=Limits(max_queued=1))
    client = connect(service.url, max_retries=0)
    await client.do("create", "a")
    error = await raised(client.do("create", "b"), RateLimited)
    assert (error.status, error.code) == (429, "queue_full")
    assert error.retry_after_s >= 1


async def test_nobody_at_the_address_is_a_connection_that_failed(connect: Connect) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        error = await raised(connect(url, max_retries=1).do("create", "a"), ConnectionFailed)
    assert error.status is None
    assert not error.was_sent
    assert url in error.message


@pytest.mark.parametrize(
    ("given", "kind", "status"),
    [
        (answer("500 Internal Server Error", b"<html>"), ServerError, 500),
        (answer("502 Bad Gateway", b'{"error": "no object"}'), ServerError, 502),
        (answer("301 Moved Permanently", location="/elsewhere"), ApiError, 301),
        (answer("200 OK", b"<html>"), ApiError, 200),
        (answer("200 OK", b'{"id": "video_1"}'), ApiError, 200),
    ],
)
async def test_an_answer_of_something_else_is_an_error_too(
    service: Service, connect: Connect, given: bytes, kind: type[ApiError], status: int
) -> None:
    async with dropping(service.url, given) as proxy:
        error = await raised(connect(proxy.url).do("retrieve", UNKNOWN), kind)
    assert error.status == status
    assert proxy.url in error.message


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://localhost", "http://", "http://localhost:99999999"])
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ApiError, match="base_url") as caught:
            kind(url)
        assert caught.value.param == "base_url"


@pytest.mark.parametrize("key", ["sk-line\nbreak", "sk-ключ", " sk"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ApiError, match="api_key") as caught:
        Client(api_key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize("value", ["a\nb", "ключ", " a", "\ud800"])
async def test_what_no_header_can_hold_is_refused(shared_service: Service, connect: Connect, value: str) -> None:
    client = connect(shared_service.url)
    for method, arguments in [("create", ("a",)), ("edit", ("a", UNKNOWN)), ("remix", (UNKNOWN, "a"))]:
        error = await raised(client.do(method, *arguments, idempotency_key=value), ApiError)
        assert error.param == "idempotency_key"
    error = await raised(all_of(client.each("events", UNKNOWN, last_event_id=value)), ApiError)
    assert error.param == "last_event_id"


@pytest.mark.parametrize(
    "settings", [{"guidance_scale": float("nan")}, {"seconds": float("inf")}, {"metadata": {"a": "\ud800"}}]
)
async def test_what_no_body_can_hold_is_a_bad_request(
    shared_service: Service, connect: Connect, settings: VideoSettings
) -> None:
    client = connect(shared_service.url)
    await raised(client.do("create", "a", **settings), BadRequest)
    await raised(client.do("edit", "a", b"no video", **settings), BadRequest)
    await raised(client.do("edit", "a", UNKNOWN, **settings), BadRequest)


@pytest.mark.parametrize("after", ["\ud800", "a" * 70_000])
async def test_what_no_address_can_hold_is_a_bad_request(shared_service: Service, connect: Connect, after: str) -> None:
    await raised(all_of(connect(shared_service.url).each("list", after=after)), BadRequest)


@pytest.mark.parametrize("name", [".", "gone.mp4", "a\0b"])
async def test_a_file_that_cannot_be_read_is_an_error_of_ours(
    shared_service: Service, connect: Connect, tmp_path: Path, name: str
) -> None:
    error = await raised(connect(shared_service.url).do("edit", "a", tmp_path / name), ApiError)
    assert error.param == "video"
    assert repr(str(tmp_path / name)) in error.message


def test_what_http_does_not_allow_is_no_broken_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(BadRequest, match="Illegal header value"), transport_explained(url):
            httpx2.get(url, headers={"idempotency-key": "a\nb"})


@pytest.mark.parametrize("video_id", ["", "../models", "a/b", "a?b", "video_é"])
async def test_what_is_no_id_reaches_no_other_path(shared_service: Service, connect: Connect, video_id: str) -> None:
    error = await raised(connect(shared_service.url).do("delete", video_id), ApiError)
    assert error.param == "video_id"


# A bad network


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "FIRST_PAUSE_S", 0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("cut_after", [0, 60])
async def test_a_lost_answer_makes_no_second_video(service: Service, connect: Connect, cut_after: int) -> None:
    async with dropping(service.url, cut_after, cut_after) as proxy:
        video = await connect(proxy.url).do("create", "a")
        remixed = await connect(proxy.url).do("remix", video.id, "b")
    assert len(proxy.received) == 4
    assert remixed.remixed_from_video_id == video.id
    assert await num_videos(service) == 2


@pytest.mark.usefixtures("quick")
async def test_two_calls_are_two_videos_unless_they_share_a_key(service: Service, connect: Connect) -> None:
    client = connect(service.url)
    first, second = await client.do("create", "a"), await client.do("create", "a")
    assert first.id != second.id
    third, fourth = [await client.do("create", "a", idempotency_key="mine") for _ in range(2)]
    assert third.id == fourth.id


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", ["cancel", "delete"])
async def test_what_is_not_the_same_twice_is_not_repeated(service: Service, connect: Connect, method: str) -> None:
    video = await service.create()
    async with dropping(service.url, 0) as proxy:
        error = await raised(connect(proxy.url).do(method, video["id"]), ConnectionFailed)
        assert error.was_sent
        assert len(proxy.received) == 1


@pytest.mark.usefixtures("quick")
async def test_tries_are_bounded(service: Service, connect: Connect) -> None:
    async with dropping(service.url, *[0] * 10) as proxy:
        await raised(connect(proxy.url, max_retries=2).do("retrieve", UNKNOWN), ConnectionFailed)
        assert len(proxy.received) == 3


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
async def test_a_busy_service_is_asked_again_after_the_time_it_named(
    service: Service, connect: Connect, status: str
) -> None:
    async with dropping(service.url, answer(status, retry_after="1")) as proxy:
        began = asyncio.get_running_loop().time()
        assert (await connect(proxy.url).do("create", "b")).prompt == "b"
        assert 1 <= asyncio.get_running_loop().time() - began < 3
    assert await num_videos(service) == 1


async def test_who_is_told_to_come_back_much_later_is_told_so(service: Service, connect: Connect) -> None:
    async with dropping(service.url, answer("429 Too Many Requests", retry_after="3600")) as proxy:
        error = await asyncio.wait_for(raised(connect(proxy.url).do("create", "a"), RateLimited), 5)
    assert error.retry_after_s == 3600
    assert await num_videos(service) == 0


@pytest.mark.parametrize("path", [".", "/", ""])
async def test_a_download_to_a_folder_is_a_clear_error(service: Service, connect: Connect, path: str) -> None:
    video = await service.completed()
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        await connect(service.url).do("download", video["id"], path)


@pytest.mark.usefixtures("quick")
async def test_a_download_that_breaks_starts_again(service: Service, connect: Connect, tmp_path: Any) -> None:
    video = await service.completed()
    async with dropping(service.url, 900, 1200) as proxy:
        await connect(proxy.url).do("download", video["id"], tmp_path / "video.mp4")
        assert len(proxy.received) == 3
    assert (tmp_path / "video.mp4").read_bytes() == service.files.video


@pytest.mark.usefixtures("quick")
async def test_a_download_that_fails_leaves_what_was_there(service: Service, connect: Connect, tmp_path: Any) -> None:
    video, folder = await service.completed(), tmp_path / "downloads"
    folder.mkdir()
    (folder / "video.mp4").write_bytes(b"earlier")
    async with dropping(service.url, *[900] * 4) as proxy:
        doing = connect(proxy.url).do("download", video["id"], folder / "video.mp4")
        await raised(doing, ConnectionFailed)
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("video.mp4", b"earlier")]


@pytest.mark.usefixtures("quick")
async def test_events_go_on_where_the_connection_broke(service: Service, connect: Connect) -> None:
    video = await service.create()
    # Of an answer's bytes, some 300 are its head and 70 an event.
    async with dropping(service.url, 450, 450) as proxy:
        seen = []
        async with asyncio.timeout(20), service.working(step_s=0.05):
            async for event in connect(proxy.url).each("events", video["id"]):
                seen.append(event)
        assert len(proxy.received) >= 3
        first, *later = [proxy.header(number, "last-event-id") for number in range(len(proxy.received))]
        assert first is None
        assert set(later) < {event.id for event in seen}
    steps = [event.step for event in seen if isinstance(event, Progress)]
    assert steps == sorted(set(steps))  # none twice
    assert isinstance(seen[-1], Completed)
    assert len({event.id for event in seen}) == len(seen)


@pytest.mark.usefixtures("quick")
async def test_events_end_when_the_service_stays_away(service: Service, connect: Connect, monkeypatch: Any) -> None:
    monkeypatch.setattr(calls, "_LONGEST_PAUSE_S", 0.01)
    video = await service.create()
    async with dropping(service.url, 450, *[b""] * 20) as proxy:
        events = connect(proxy.url, max_retries=0).each("events", video["id"])
        assert isinstance(await anext(events), Queued)
        work = await service.claim()
        rest = asyncio.create_task(all_of(events))
        for step in range(1, 6):
            await work.step(step)
            await asyncio.sleep(0.1)  # each is told
        with pytest.raises(ConnectionFailed):
            await asyncio.wait_for(rest, 5)
        assert len(proxy.received) == 1 + 8


@pytest.mark.usefixtures("quick")
async def test_streams_that_stay_open_are_no_failures_though_they_tell_nothing(
    service: Service, connect: Connect, monkeypatch: Any
) -> None:
    monkeypatch.setattr(calls, "_STAYED_OPEN_S", 0.0)
    video = await service.completed()
    async with dropping(service.url, *[event_stream()] * 20) as proxy:
        assert (await connect(proxy.url, max_retries=0).do("wait", video["id"])).status == "completed"
        assert len(proxy.received) == 21


@pytest.mark.usefixtures("quick")
async def test_streams_that_end_at_once_are_failures(service: Service, connect: Connect) -> None:
    async with dropping(service.url, *[event_stream()] * 20) as proxy:
        await raised(connect(proxy.url, max_retries=2).do("wait", UNKNOWN), ConnectionFailed)
        assert len(proxy.received) == 3


@pytest.mark.usefixtures("quick")
async def test_a_stream_that_nobody_speaks_on_has_not_worked(connect: Connect, monkeypatch: Any) -> None:
    monkeypatch.setattr(calls, "_STAYED_OPEN_S", 0.0)
    monkeypatch.setattr(calls, "_SILENCE_S", 0.1)
    num_asked = 0

    async def open_only(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_asked
        num_asked += 1
        writer.write(answer("200 OK", content_type="text/event-stream", content_length="1"))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(open_only, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await raised(connect(url, max_retries=2).do("wait", UNKNOWN), ConnectionFailed)
    assert num_asked == 3


@pytest.mark.usefixtures("quick")
async def test_events_of_a_newer_service_are_passed_over(service: Service, connect: Connect) -> None:
    video = await service.create()
    await (await service.claim()).complete()
    stream = event_stream(
        'id: a\nevent: thought\ndata: {"text": "hm"}\n\n',
        'id: b\nevent: resumed\ndata: {"step": 4, "resumes": 1, "more": true}\n\n',
    )
    async with dropping(service.url, stream) as proxy:
        resumed, completed = await all_of(connect(proxy.url).each("events", video["id"]))
        assert proxy.header(1, "last-event-id") == "b"
    assert resumed == Resumed(id="b", step=4, resumes=1)
    assert isinstance(completed, Completed)


async def test_a_page_in_place_of_events_is_an_error_at_once(service: Service, connect: Connect) -> None:
    async with dropping(service.url, answer("200 OK", b"<html>", content_type="text/html")) as proxy:
        error = await raised(connect(proxy.url).do("wait", UNKNOWN), ApiError)
        assert len(proxy.received) == 1
    assert error.status == 200
    assert "not one of this service's" in error.message


async def test_an_event_that_makes_no_sense_is_an_error(service: Service, connect: Connect) -> None:
    async with dropping(service.url, event_stream("id: a\nevent: progress\ndata: {}\n\n")) as proxy:
        await raised(all_of(connect(proxy.url).each("events", UNKNOWN)), ApiError)


@pytest.mark.usefixtures("quick")
async def test_a_video_that_is_removed_while_it_is_watched_is_not_found(service: Service, connect: Connect) -> None:
    stream = event_stream('id: a\nevent: queued\ndata: {"position": 0}\n\n')  # so the service ends it then
    async with dropping(service.url, stream) as proxy:
        await raised(connect(proxy.url).do("wait", UNKNOWN), NotFound)
        assert len(proxy.received) == 2


async def test_errors_say_what_json_said(service: Service, connect: Connect) -> None:
    body = json.dumps({"error": {"message": "m", "type": "server_error", "param": None, "code": "c"}}).encode()
    async with dropping(service.url, answer("500 Internal Server Error", body)) as proxy:
        error = await raised(connect(proxy.url).do("retrieve", UNKNOWN), ServerError)
    assert (error.message, error.code, error.param, error.retry_after_s) == ("m", "c", None, None)
