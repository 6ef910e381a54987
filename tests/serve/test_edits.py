"""Edits: a video made of another one, by upload or by id. What comes from strangers is read within limits."""

import asyncio
import functools
import io
import json
import threading
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from anyio import to_thread
from api_service import ALICE, BOB, KEYS, UNKNOWN, Files, error_of, running
from PIL import Image
from typer.testing import CliRunner

from serve_app import bodies, inputs
from serve_app.api import Limits
from serve_app.cli import app
from serve_app.client import AsyncClient, BadRequest, Client
from serve_app.errors import Unavailable
from serve_app.sweeper import sweep
from t2v_core import params
from t2v_core.media import encode_video
from t2v_core.video_input import read_video

pytestmark = pytest.mark.anyio


def picture_book(num_frames: int = 12, height: int = 48, width: int = 64) -> torch.Tensor:
    """Frames that get brighter."""
    levels = torch.linspace(20, 220, num_frames).to(torch.uint8)
    return levels[:, None, None, None].expand(num_frames, height, width, 3).contiguous()


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return encode_video(picture_book(), fps=4)


async def edit(service: Any, video: Any, **settings: Any) -> httpx2.Response:
    """Multipart, as a browser or curl sends it."""
    values = {name: str(value) for name, value in settings.items()}
    return await service.client.post(
        "/v1/videos/edits",
        data={"prompt": "a blue square", **values},
        files={"video": ("mine.mp4", video, "video/mp4")},
    )


async def edit_of(service: Any, video_id: Any, **settings: Any) -> httpx2.Response:
    body = {"prompt": "a blue square", "video": {"id": video_id}, **settings}
    return await service.client.post("/v1/videos/edits", json=body)


async def frames_kept(service: Any, video_id: str) -> torch.Tensor:
    job = await service.jobs.get(video_id)
    assert job.input_path is not None
    return inputs.frames_of(await service.artifacts.read(job.input_path))


async def test_an_upload_is_kept_as_the_frames_that_the_job_needs(service: Any, mp4: bytes) -> None:
    video = (await edit(service, mp4, strength=0.5, num_inference_steps=10, seed=7)).raise_for_status().json()
    assert (video["status"], video["prompt"], video["strength"]) == ("queued", "a blue square", 0.5)
    assert (video["size"], video["num_frames"], video["seed"]) == ("64x48", 8, 7)
    assert (video["num_inference_steps"], video["num_steps"]) == (10, 5)  # the last half of them is run
    frames = await frames_kept(service, video["id"])
    assert (tuple(frames.shape), frames.dtype) == ((8, 48, 64, 3), torch.uint8)
    brightness = frames.float().mean(dim=(1, 2, 3))
    assert (brightness.diff() > 5).all()
    assert abs(brightness[0].item() - 20) < 6


async def test_without_a_strength_it_is_the_models_own(service: Any, mp4: bytes) -> None:
    assert (await edit(service, mp4)).raise_for_status().json()["strength"] == 0.6


async def test_a_completed_video_can_be_edited_by_its_id(service: Any) -> None:
    made = await service.completed()
    video = (await edit_of(service, made["id"], strength=0.4, num_frames=1)).raise_for_status().json()
    assert video["num_frames"] == 1
    assert (await frames_kept(service, video["id"])).shape[0] == 1


async def test_the_openai_client_edits_a_file(service: Any, mp4: bytes) -> None:
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="unused")
    source = ("a.mp4", io.BytesIO(mp4), "video/mp4")
    video = await to_thread.run_sync(functools.partial(client.videos.edit, prompt="a blue square", video=source))
    assert (video.status, video.prompt) == ("queued", "a blue square")


async def test_our_client_edits_bytes_a_file_and_a_video(service: Any, mp4: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine\udcff.mp4"  # a byte that is no UTF-8
    path.write_bytes(mp4)
    made = await service.completed()
    settings: dict[str, Any] = {"seed": 3, "num_frames": 1, "metadata": {"order": "17"}, "num_inference_steps": 10}
    async with AsyncClient(service.url) as client:
        for source in (mp4, path, made["id"]):
            video = await client.edit("a blue square", source, strength=0.5, **settings)
            assert (video.prompt, video.strength, video.seed, video.num_steps) == ("a blue square", 0.5, 3, 5)
            assert video.metadata == {"order": "17"}
        with pytest.raises(BadRequest, match="video"):
            await client.edit("a blue square", b"no video")
    with Client(service.url) as blocking:
        video = await to_thread.run_sync(functools.partial(blocking.edit, "a ring", path, **settings))
        assert video.strength == 0.6


async def test_the_command_line_edits_a_file(service: Any, mp4: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.mp4"
    path.write_bytes(mp4)
    submit = ["submit", "a ring", "--url", service.url, "--strength", "0.3", "--json"]
    run = functools.partial(CliRunner().invoke, app, [*submit, "--video", str(path)])
    result = await to_thread.run_sync(run)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["strength"] == 0.3
    refused = await to_thread.run_sync(functools.partial(CliRunner().invoke, app, submit))
    assert refused.exit_code == 2
    assert "--video" in refused.output


async def test_a_remix_of_an_edit_is_of_the_same_input(service: Any, mp4: bytes) -> None:
    first = (await edit(service, mp4, strength=0.3, num_inference_steps=10)).raise_for_status().json()
    response = await service.client.post(f"/v1/videos/{first['id']}/remix", json={"prompt": "a ring"})
    second = response.raise_for_status().json()
    assert (second["prompt"], second["strength"], second["seed"]) == ("a ring", 0.3, first["seed"])
    assert torch.equal(await frames_kept(service, second["id"]), await frames_kept(service, first["id"]))


async def test_the_same_key_with_another_file_is_another_request(service: Any, mp4: bytes) -> None:
    other = encode_video(picture_book().flip(0), fps=4)
    answers = []
    for data in (mp4, mp4, other):
        answers.append(
            await service.client.post(
                "/v1/videos/edits",
                data={"prompt": "a", "seed": "1"},
                files={"video": ("a.mp4", data, "video/mp4")},
                headers={"Idempotency-Key": "one"},
            )
        )
    assert [answer.status_code for answer in answers] == [200, 200, 422]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    # Nothing is left of what was not accepted.
    assert await service.artifacts.prefixes(-60) == [f"{answers[0].json()['id']}/0"]


async def test_an_input_is_needed_as_long_as_its_job(service: Any, mp4: bytes) -> None:
    video = (await edit(service, mp4)).raise_for_status().json()
    assert await service.jobs.names_prefix(f"{video['id']}/0")
    assert (await service.client.delete(f"/v1/videos/{video['id']}")).status_code == 200
    assert await service.artifacts.prefixes(-60) == []


@pytest.mark.parametrize("end", ["cancelled while it waits", "cancelled", "failed"])
async def test_the_input_of_an_edit_that_made_nothing_is_not_kept(service: Any, mp4: bytes, end: str) -> None:
    video = (await edit(service, mp4)).raise_for_status().json()
    if end == "cancelled while it waits":
        await service.client.post(f"/v1/videos/{video['id']}/cancel")
        assert await service.artifacts.prefixes(-60) == []  # at once: nobody bounds how often it is done
    else:
        work = await service.claim()
        await (work.fail() if end == "failed" else work.cancelled())
        await sweep(service.jobs, service.artifacts, min_age_s=-60)
        assert await service.artifacts.prefixes(-60) == []
    response = await service.client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a ring"})
    error = error_of(response, 404)
    assert error["code"] == "content_gone"
    assert end.split()[0] in error["message"]
    assert "input" in error["message"]


async def test_the_input_of_a_completed_edit_is_kept_for_remixes(service: Any, mp4: bytes) -> None:
    video = (await edit(service, mp4)).raise_for_status().json()
    await (await service.claim()).complete()
    await sweep(service.jobs, service.artifacts, min_age_s=-60)
    response = await service.client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a ring"})
    assert response.raise_for_status().json()["strength"] == video["strength"]


@pytest.mark.parametrize(
    ("data", "settings", "param", "why"),
    [
        (b"no video at all", {}, "video", "video"),
        (b"", {}, "video", "video"),
        (None, {"num_frames": 64}, "video", "frames"),
        (None, {"strength": 0}, "strength", "step"),
        (None, {"strength": 2}, "strength", "from 0 to 1"),
        (None, {"strength": "much"}, "strength", "number"),
        (None, {"num_inference_steps": 2, "strength": 0.1}, "strength", "less than one step"),
        (None, {"width": 64}, "width", "no such field"),
    ],
)
async def test_a_bad_edit_is_refused_and_leaves_nothing(
    service: Any, mp4: bytes, data: bytes | None, settings: dict[str, Any], param: str, why: str
) -> None:
    response = await edit(service, mp4 if data is None else data, **settings)
    error = error_of(response, 400)
    assert error["param"] == param
    assert why in error["message"]
    assert await service.jobs.num_queued() == 0
    assert await service.artifacts.prefixes(-60) == []


async def test_a_video_cut_in_the_middle_is_refused(service: Any, mp4: bytes) -> None:
    error = error_of(await edit(service, mp4[: len(mp4) // 2]), 400)
    assert (error["code"], error["param"]) == ("unreadable_video", "video")


async def test_the_input_of_a_job_stays_though_nobody_heard_that_it_was_accepted(
    service: Any, mp4: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, made = service.jobs.create, []

    async def create_and_lose(new: Any, **bounds: Any) -> Any:
        made.append((await create(new, **bounds))[0])
        raise Unavailable("the connection was lost after the commit")

    with monkeypatch.context() as patched:
        patched.setattr(service.jobs, "create", create_and_lose)
        error_of(await edit(service, mp4), 503)
    assert (await frames_kept(service, made[0].id)).shape[0] == 8


async def test_a_body_of_json_is_no_upload(service: Any) -> None:
    response = await edit_of(service, "video_1", metadata={"much": "x" * 100_000})
    error_of(response, 413)


async def test_an_edit_without_a_video_says_what_to_send(service: Any) -> None:
    response = await service.client.post("/v1/videos/edits", json={"prompt": "a"})
    assert "video is missing" in error_of(response, 400)["message"]
    for video in ("a.mp4", {"id": 7}, {"url": "https://example.com"}, 7):
        response = await service.client.post("/v1/videos/edits", json={"prompt": "a", "video": video})
        assert error_of(response, 400)["param"] == "video"


async def test_only_ones_own_completed_videos_can_be_edited(tmp_path: Path, files: Files) -> None:
    async with running(tmp_path, files, KEYS, ALICE) as service:
        made = await service.completed()
        unfinished = await service.create()
        assert "completed" in error_of(await edit_of(service, unfinished["id"]), 400)["message"]
        assert error_of(await edit_of(service, UNKNOWN), 404)["param"] == "video"
        async with httpx2.AsyncClient(base_url=service.url, headers={"authorization": f"Bearer {BOB}"}) as bob:
            body = {"prompt": "a", "video": {"id": made["id"]}}
            assert error_of(await bob.post("/v1/videos/edits", json=body), 404)


async def test_an_upload_that_is_too_large_is_refused(tmp_path: Path, files: Files, mp4: bytes) -> None:
    async with running(
        tmp_path, files, limits=Limits(max_body_bytes=1_000, max_upload_bytes=len(mp4) + 1_000)
    ) as service:
        assert (await edit(service, mp4)).status_code == 200
        assert error_of(await edit(service, mp4 + b"\0" * 2_000), 413)
        body = {"prompt": "a" * 2_000}
        assert error_of(await service.client.post("/v1/videos", json=body), 413)  # others stay small


def slide_show() -> bytes:
    """A few bytes that are shown for two minutes."""
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = io.BytesIO()
    pictures[0].save(data, "GIF", save_all=True, append_images=pictures[1:], duration=60_000)
    return data.getvalue()


@pytest.mark.parametrize(
    ("size", "num_frames", "num_read", "why"),
    [
        ("1024x1024", 300, 0, "300 frames of 1024x1024"),
        ("1024x1024", None, 0, "1 frames of 1024x1024"),
        ("512x512", None, 2, "2 frames of 512x512"),  # of which the service makes one
    ],
)
async def test_of_what_is_too_large_no_more_is_read_than_shows_it(
    service: Any, size: str, num_frames: int | None, num_read: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def read_and_count(*arguments: Any, **options: Any) -> torch.Tensor:
        read.append(read_video(*arguments, **options))
        return read[-1]

    monkeypatch.setattr(params, "read_video", read_and_count)
    length = {} if num_frames is None else {"num_frames": num_frames}
    error = error_of(await edit(service, slide_show(), size=size, fps=10, **length), 400)
    assert (error["param"], error["message"].partition(" are ")[0]) == ("size", why)
    assert sum(len(frames) for frames in read) == num_read


async def test_without_a_limit_an_input_has_one(tmp_path: Path, files: Files) -> None:
    async with running(tmp_path, files, limits=Limits()) as service:
        response = await edit(service, slide_show(), size="4096x4096", num_frames=100, fps=10)
        assert "the most that is read of an input video" in error_of(response, 400)["message"]


async def begin_upload(url: str, key: str, num_bytes: int) -> asyncio.StreamWriter:
    """The first bytes of one that says no more."""
    _, _, address = url.partition("//")
    _, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(
        f"POST /v1/videos/edits HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {key}\r\n"
        f"content-type: multipart/form-data; boundary=x\r\ncontent-length: {num_bytes}\r\n\r\n--x".encode()
    )
    await writer.drain()
    return writer


async def test_one_keys_uploads_leave_room_for_anothers(tmp_path: Path, files: Files, mp4: bytes) -> None:
    async with running(tmp_path, files, KEYS, BOB) as service:
        alice = {"authorization": f"Bearer {ALICE}"}
        form = {"data": {"prompt": "a"}, "files": {"video": ("a.mp4", mp4, "video/mp4")}, "headers": alice}
        edited = (await service.client.post("/v1/videos/edits", **form)).raise_for_status().json()
        created = (await service.client.post("/v1/videos", json={"prompt": "a"}, headers=alice)).json()
        stalled = [await begin_upload(service.url, ALICE, 1_000) for _ in range(8)]

        async def is_full() -> bool:
            response = await service.client.post("/v1/videos/edits", json={"prompt": "a"}, headers=alice)
            if response.status_code != 429:
                return False
            assert "8 uploads of this key" in error_of(response, 429)["message"]
            assert response.headers["retry-after"] == "5"
            return True

        while not await is_full():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)
        assert (await edit(service, mp4)).status_code == 200
        remix = functools.partial(service.client.post, json={"prompt": "b"}, headers=alice)
        # A remix of an edit has its input in memory as well.
        assert "8 uploads" in error_of(await remix(f"/v1/videos/{edited['id']}/remix"), 429)["message"]
        assert (await remix(f"/v1/videos/{created['id']}/remix")).status_code == 200
        for writer in stalled:
            writer.close()
        while await is_full():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)
        assert (await remix(f"/v1/videos/{edited['id']}/remix")).status_code == 200


async def test_a_body_that_says_that_it_is_too_large_is_refused_before_it_comes(tmp_path: Path, files: Files) -> None:
    async with running(tmp_path, files, limits=Limits(max_upload_bytes=10_000)) as service:
        _, _, address = service.url.partition("//")
        reader, writer = await asyncio.open_connection(*address.split(":"))
        kind = "multipart/form-data; boundary=x"
        head = f"POST /v1/videos/edits HTTP/1.1\r\nhost: {address}\r\ncontent-type: {kind}\r\ncontent-length: 10001"
        writer.write(f"{head}\r\n\r\n".encode())
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


async def test_no_more_are_decoded_at_a_time_when_clients_go_away(
    service: Any, mp4: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, at_once, may_end = 0, [], threading.Event()

    def decode_slowly(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal decoding
        decoding += 1
        at_once.append(decoding)
        may_end.wait(10)
        decoding -= 1
        return read_video(*arguments, **options)

    monkeypatch.setattr(params, "read_video", decode_slowly)
    for _ in range(3):
        leaving = [asyncio.create_task(edit(service, mp4)) for _ in range(2)]
        while len(at_once) < 2:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        for task in leaving:
            task.cancel()
    staying = asyncio.create_task(edit(service, mp4))
    await asyncio.sleep(0.2)
    may_end.set()
    assert (await staying).status_code == 200
    assert max(at_once) == 2


async def test_the_api_answers_while_a_video_is_read(service: Any, mp4: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def read_when_told(*arguments: Any, **options: Any) -> torch.Tensor:
        begun.set()
        assert may_end.wait(30)
        return read_video(*arguments, **options)

    monkeypatch.setattr(params, "read_video", read_when_told)
    reading = asyncio.create_task(edit(service, mp4))
    assert await to_thread.run_sync(begun.wait, 30)
    assert (await service.client.get("/healthz")).status_code == 200
    may_end.set()
    (await reading).raise_for_status()


async def test_the_api_answers_while_a_body_is_parsed(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end, parse = threading.Event(), threading.Event(), bodies._parse_multipart

    def parse_when_told(data: bytes, boundary: bytes | None) -> dict[str, Any]:
        begun.set()
        assert may_end.wait(30)
        return parse(data, boundary)

    monkeypatch.setattr(bodies, "_parse_multipart", parse_when_told)
    editing = asyncio.create_task(edit(service, b"no video"))
    assert await to_thread.run_sync(begun.wait, 30)
    assert (await service.client.get("/healthz")).status_code == 200
    may_end.set()
    assert error_of(await editing, 400)["param"] == "video"
