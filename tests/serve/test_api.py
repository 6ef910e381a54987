"""Every route, every status it answers with, and who may ask. Each answer is held against /openapi.json (conftest)."""

import asyncio
import json
from typing import Any

import httpx2
import pytest

from serve_app import videos
from serve_app.api import Limits, create_app
from serve_app.errors import HTTP_ANSWERS, Superseded, Unavailable
from t2v_core.errors import CheckpointError, GenerationFailed, OutOfMemory, T2VError

pytestmark = pytest.mark.anyio

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
KEYS = f"alice:{ALICE}\nbob:{BOB}"
UNKNOWN = "video_00000000000000000000000000000000"

# Whatever needs a key, and works on a video that is there.
OWNED = [
    ("GET", ""),
    ("DELETE", ""),
    ("POST", "/cancel"),
    ("POST", "/remix"),
    ("GET", "/content"),
    ("HEAD", "/content"),
    ("GET", "/events"),
]


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    return dict(error)


# -- create ------------------------------------------------------------------------------------------------------------


async def test_a_created_video_reports_all_it_will_be_made_with(service: Any) -> None:
    response = await service.client.post(
        "/v1/videos",
        json={
            "prompt": "a red circle",
            "model": "tiny",
            "size": "32x40",
            "seconds": "2.5",
            "fps": 8,
            "seed": 0,
            "negative_prompt": "blurry",
            "num_inference_steps": 7,
            "guidance_scale": 3,
            "sampler": "unipc",
            "format": "webm",
            "priority": "urgent",
            "metadata": {"order": "17"},
        },
    )
    video = response.json()
    assert response.status_code == 200
    assert 0 < int(response.headers["openai-poll-after-ms"]) <= 1000
    assert video.pop("id").startswith("video_")
    assert isinstance(video.pop("created_at"), int)
    assert video == {
        "object": "video",
        "model": "tiny",
        "status": "queued",
        "progress": 0,
        "completed_at": None,
        "expires_at": None,
        "size": "32x40",
        "seconds": "2.5",
        "prompt": "a red circle",
        "remixed_from_video_id": None,
        "error": None,
        "seed": 0,
        "negative_prompt": "blurry",
        "num_frames": 20,
        "fps": 8,
        "num_inference_steps": 7,
        "guidance_scale": 3.0,
        "sampler": "unipc",
        "format": "webm",
        "priority": "urgent",
        "metadata": {"order": "17"},
        "step": 0,
        "num_steps": 7,
        "eta_s": None,
        "queue_position": None,
        "resumes": 0,
    }
    assert service.num_woken


async def test_what_is_left_out_takes_the_checkpoints_defaults(service: Any) -> None:
    video, other = await service.create(), await service.create()
    assert (video["size"], video["num_frames"], video["fps"], video["seconds"]) == ("64x48", 8, 4, "2")
    assert (video["model"], video["sampler"], video["num_inference_steps"]) == ("tiny", "dpmpp_2m", 5)
    assert video["seed"] != other["seed"]


async def test_null_is_as_good_as_left_out(service: Any) -> None:
    video = await service.create(seed=None, size=None, seconds=None, metadata=None, input_reference=None, model=None)
    assert video["size"] == "64x48"


@pytest.mark.parametrize("seconds", ["3", 3, 3.0, "3.1", 2.9])
async def test_seconds_are_rounded_to_frames(service: Any, seconds: object) -> None:
    assert (await service.create(seconds=seconds))["num_frames"] == 12


async def test_multipart_says_the_same_as_json(service: Any) -> None:
    fields = {
        "prompt": "a red circle",
        "seed": "7",
        "guidance_scale": "2.5",
        "num_frames": "3",
        "size": "32x32",
        "metadata[order]": "17",
        "metadata[näme]": "größe",
    }
    response = await service.client.post("/v1/videos", files={name: (None, text) for name, text in fields.items()})
    by_form = response.json()
    by_json = await service.create(
        seed=7, guidance_scale=2.5, num_frames=3, size="32x32", metadata={"order": "17", "näme": "größe"}
    )
    assert response.status_code == 200
    for video in (by_form, by_json):
        del video["id"], video["created_at"]
    assert by_form == by_json


# -- bad bodies --------------------------------------------------------------------------------------------------------

BAD_FIELDS: list[tuple[str, object, str]] = [
    # field, value, what the message must hold beside the field
    ("prompt", "", "empty"),
    ("prompt", "  ", "empty"),
    ("prompt", None, "None"),
    ("prompt", 7, "7"),
    ("prompt", ["a"], "'a'"),
    ("prompt", "x" * 4001, "4001"),
    ("prompt", "a\0b", "NUL"),
    ("negative_prompt", 7, "7"),
    ("negative_prompt", "a\0b", "NUL"),
    ("negative_prompt", "x" * 4001, "4001"),
    ("model", "sora-2", "tiny, other"),
    ("model", 7, "7"),
    ("size", "big", "256x256"),
    ("size", "64X64", "256x256"),
    ("size", "64x", "256x256"),
    ("size", "-8x8", "256x256"),
    ("size", "٦٤x٦٤", "256x256"),
    ("size", 64, "64"),
    ("size", "63x64", "multiple of 8"),
    ("size", "0x64", "from 8"),
    ("size", "99999x64", "4096"),
    ("size", "4096x4096", "smaller size"),
    ("seconds", "long", "number"),
    ("seconds", "nan", "number"),
    ("seconds", "inf", "number"),
    ("seconds", "", "number"),
    ("seconds", "0", "above 0"),
    ("seconds", -1, "above 0"),
    ("seconds", "1e300", "1024"),
    ("seconds", 10**4000, ""),
    ("seconds", "0.01", "0 frames"),
    ("seconds", True, "True"),
    ("seconds", [2], "2"),
    ("seed", -1, "-1"),
    ("seed", 2**32, "4294967296"),
    ("seed", "7", "7"),
    ("seed", 1.5, "1.5"),
    ("seed", True, "True"),
    ("seed", 10**4000, ""),
    ("num_frames", 0, "0"),
    ("num_frames", 1025, "1025"),
    ("num_frames", "8", "8"),
    ("fps", 0, "0"),
    ("fps", 121, "121"),
    ("num_inference_steps", 0, "0"),
    ("num_inference_steps", 1000, "1000"),
    ("num_inference_steps", 2.5, "2.5"),
    ("guidance_scale", -0.1, "-0.1"),
    ("guidance_scale", 101, "101"),
    ("guidance_scale", "9", "9"),
    ("guidance_scale", True, "True"),
    ("sampler", "heun", "dpmpp_2m"),
    ("format", "avi", "webm"),
    ("priority", "now", "urgent"),
    ("metadata", {"order": 17}, "17"),
    ("metadata", {"": "17"}, "at least 1"),
    ("metadata", {"k" * 65: "17"}, "64"),
    ("metadata", {"k": "v" * 513}, "512"),
    ("metadata", {"k": "a\0b"}, "NUL"),
    ("metadata", {str(index): "" for index in range(17)}, "16"),
    ("metadata", "order", "order"),
    ("input_reference", {"image_url": "https://example.com/a.png"}, "text only"),
    ("input_reference", "", "text only"),
    ("webhook_url", "https://example.com", "no such field"),
    ("strength", 0.5, "no such field"),
    ("eta", 0.5, "no such field"),
    ("width", 64, "no such field"),
    ("PROMPT", "a", "no such field"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD_FIELDS, ids=lambda value: str(value)[:20])
async def test_a_bad_value_is_400_that_names_the_field_and_the_rule(
    shared_service: Any, field: str, value: object, rule: str
) -> None:
    response = await shared_service.client.post("/v1/videos", json={"prompt": "a red circle", field: value})
    error = error_of(response, 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert field in error["message"] or field in ("seconds", "size")
    assert rule in error["message"]
    assert len(error["message"]) < 6000
    assert await shared_service.jobs.num_queued() == 0


async def test_a_missing_prompt_is_named(shared_service: Any) -> None:
    error = error_of(await shared_service.client.post("/v1/videos", json={}), 400)
    assert (error["param"], error["message"]) == ("prompt", "prompt is missing: give one")


async def test_seconds_and_num_frames_together_are_refused(shared_service: Any) -> None:
    body = {"prompt": "a", "seconds": "2", "num_frames": 8}
    assert error_of(await shared_service.client.post("/v1/videos", json=body), 400)["param"] == "seconds"


async def test_an_impossible_fps_is_blamed_and_not_the_seconds(shared_service: Any) -> None:
    for fps in (0, -4, 10**300):
        body = {"prompt": "a", "seconds": "2", "fps": fps}
        assert error_of(await shared_service.client.post("/v1/videos", json=body), 400)["param"] == "fps"


async def test_too_many_pixels_are_refused_with_the_limit(shared_service: Any) -> None:
    body = {"prompt": "a", "size": "64x64", "num_frames": 65}
    assert str(64 * 64 * 64) in error_of(await shared_service.client.post("/v1/videos", json=body), 400)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "a red',
        b'{"prompt": "a"} trailing',
        b'{"prompt": "a", "seed": NaN}',
        b'{"prompt": "\\ud800"}',
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"a"',
        b"[" * 20_000,
        b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}",
        b'{"prompt": "a", "guidance_scale": 1e999}',
    ],
)
async def test_damaged_json_is_400(shared_service: Any, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    error_of(await shared_service.client.post("/v1/videos", content=body, headers=headers), 400)


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n%s\r\n\r\n%s\r\n" % (head.encode(), data) for head, data in parts) + end


def named(name: str) -> str:
    return f'Content-Disposition: form-data; name="{name}"'


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (form((named("prompt"), b"a"), end=b""), None),
        (form((named("prompt"), b"a"))[:-6], None),
        (form((named("prompt"), b"a"))[:20], None),
        (b"prompt=a", None),
        (form(("Content-Disposition: form-data", b"a")), None),
        (form(("X: y", b"a")), None),
        (form((named("prompt"), b"\xff")), "prompt"),
        (form((named("prompt"), b"a"), (named("prompt"), b"b")), "prompt"),
        (form((named("prompt"), b"a"), (named("metadata[k]"), b"b"), (named("metadata[k]"), b"b")), "metadata"),
        (form((named("prompt"), b"a"), (named("metadata"), b"b"), (named("metadata[k]"), b"b")), "metadata"),
        (form((named("prompt"), b"a"), (named("seed"), b"seven")), "seed"),
        (form((named("prompt"), b"a"), (named("seed"), b"")), "seed"),
        (form((named("prompt"), b"a"), (named("seed"), b"1" * 5000)), "seed"),
        (form((named("prompt"), b"a"), (named("guidance_scale"), b"nan")), "guidance_scale"),
        (form((named("prompt"), b"a"), (named("webhook_url"), b"x")), "webhook_url"),
        (form((named("prompt"), b"a"), (named("seed[x]"), b"1")), "seed"),
        (form((named("prompt"), b"a"), (named("tags[]"), b"1")), "tags"),
        (form((named("prompt") + '; filename="a.txt"', b"a")), "prompt"),
        (form((named("prompt"), b"a"), (named("input_reference") + '; filename="a.png"', b"PNG")), "input_reference"),
        (form((named("prompt"), b"a"), (named("input_reference[file_id]"), b"f")), "input_reference"),
        (form(*[(named(f"metadata[{index}]"), b"a") for index in range(300)]), None),
    ],
)
async def test_damaged_multipart_is_400(shared_service: Any, body: bytes, param: str | None) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert (
        error_of(await shared_service.client.post("/v1/videos", content=body, headers=headers), 400)["param"] == param
    )


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=" + "b" * 300])
async def test_a_bad_boundary_is_400(shared_service: Any, content_type: str) -> None:
    body = form((named("prompt"), b"a"))
    error_of(await shared_service.client.post("/v1/videos", content=body, headers={"content-type": content_type}), 400)


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "a/b;;=;", '"']
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync"])
async def test_another_content_type_is_415(shared_service: Any, path: str, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type is not None else {}
    error = error_of(await shared_service.client.post(path, content=b'{"prompt": "a"}', headers=headers), 415)
    assert "application/json" in error["message"]


async def test_a_charset_is_no_other_content_type(service: Any) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await service.client.post("/v1/videos", content=b'{"prompt": "a"}', headers=headers)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync"])
@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=b"])
async def test_a_body_above_the_limit_is_413_whatever_its_length_says(
    service: Any, path: str, content_type: str
) -> None:
    async def endless() -> Any:
        for _ in range(1000):
            yield b" " * 10_000

    headers = {"content-type": content_type}
    for content in (b" " * 64_001, b" " * 20_000_000, endless()):
        error = error_of(await service.client.post(path, content=content, headers=headers), 413)
        assert "64000" in error["message"]
    fits = json.dumps({"prompt": "a"}).encode().ljust(64_000)
    if path == "/v1/videos" and content_type == "application/json":
        assert (await service.client.post(path, content=fits, headers=headers)).status_code == 200


async def test_a_client_that_leaves_while_it_sends_leaves_no_job(service: Any, caplog: Any) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    writer.write(head.encode() + b'{"prompt": "a"')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await asyncio.sleep(0.1)
    assert await service.jobs.num_queued() == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# -- idempotency and the queue's limits --------------------------------------------------------------------------------


async def test_the_same_key_and_body_give_the_same_video(service: Any) -> None:
    headers = {"idempotency-key": "k1"}
    bodies = [{"prompt": "a"}, {"prompt": "a", "fps": 4, "metadata": {}}]  # the second says the defaults
    answers = [await service.client.post("/v1/videos", json=body, headers=headers) for body in bodies]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert await service.jobs.num_queued() == 1


@pytest.mark.parametrize(
    "other",
    [{"prompt": "b"}, {"seed": 1}, {"fps": 5}, {"priority": "low"}, {"metadata": {"k": "v"}}, {"model": "other"}],
)
async def test_the_same_key_with_another_body_is_422(service: Any, other: dict[str, Any]) -> None:
    headers = {"idempotency-key": "k1"}
    await service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers)
    error = error_of(await service.client.post("/v1/videos", json={"prompt": "a"} | other, headers=headers), 422)
    assert error["code"] == "idempotency_conflict"


async def test_a_seed_that_was_given_counts_in_the_body(service: Any) -> None:
    for seed, status in [(1, 200), (1, 200), (2, 422), (None, 422)]:
        body = {"prompt": "a", "seed": seed}
        response = await service.client.post("/v1/videos", json=body, headers={"idempotency-key": "k1"})
        assert response.status_code == status


async def test_a_remix_is_no_repeat_of_a_create(service: Any) -> None:
    headers = {"idempotency-key": "k1"}
    first = (await service.client.post("/v1/videos", json={"prompt": "a", "seed": 1}, headers=headers)).json()
    remix = f"/v1/videos/{first['id']}/remix"
    error_of(await service.client.post(remix, json={"prompt": "a"}, headers=headers), 422)
    again = [
        await service.client.post(remix, json={"prompt": "a"}, headers={"idempotency-key": "k2"}) for _ in range(2)
    ]
    assert again[0].json() == again[1].json()


async def test_an_idempotency_key_out_of_bounds_is_400(shared_service: Any) -> None:
    for key in ("", "k" * 256):
        response = await shared_service.client.post(
            "/v1/videos", json={"prompt": "a"}, headers={"idempotency-key": key}
        )
        assert error_of(response, 400)["param"] == "idempotency-key"


async def test_a_full_queue_is_429_with_a_time_to_try_again(run_service: Any) -> None:
    service = await run_service(limits=Limits(max_queued=2))
    await service.create()
    await service.create()
    response = await service.client.post("/v1/videos", json={"prompt": "a"})
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert int(response.headers["retry-after"]) >= 1
    assert "x-should-retry" not in response.headers


async def test_one_owner_cannot_fill_the_queue_for_the_others(run_service: Any) -> None:
    service = await run_service(keys=KEYS, key=ALICE, limits=Limits(max_queued_per_owner=1))
    await service.create()
    error_of(await service.client.post("/v1/videos", json={"prompt": "a"}), 429)
    bob = {"authorization": f"Bearer {BOB}"}
    assert (await service.client.post("/v1/videos", json={"prompt": "a"}, headers=bob)).status_code == 200


# -- one video ---------------------------------------------------------------------------------------------------------


async def test_a_video_is_followed_from_the_queue_to_its_end(service: Any) -> None:
    async def get() -> dict[str, Any]:
        response = await service.client.get(f"/v1/videos/{video['id']}")
        assert 0 < int(response.headers["openai-poll-after-ms"]) <= 1000
        return dict(response.json())

    other, video = await service.create(), await service.create()
    assert ((await get())["status"], (await get())["queue_position"]) == ("queued", 1)
    await service.client.delete(f"/v1/videos/{other['id']}")
    assert (await get())["queue_position"] == 0
    work = await service.claim()
    work.eta_s = 2.5
    await work.step(2)
    seen = await get()
    assert (seen["status"], seen["step"], seen["num_steps"], seen["progress"]) == ("in_progress", 2, 5, 40)
    assert (seen["eta_s"], seen["queue_position"], seen["completed_at"]) == (2.5, None, None)
    await work.complete()
    seen = await get()
    assert (seen["status"], seen["progress"], seen["error"]) == ("completed", 100, None)
    assert seen["created_at"] <= seen["completed_at"] < seen["expires_at"]


async def test_a_failed_video_says_why(service: Any) -> None:
    video = await service.create()
    await (await service.claim()).fail()
    seen = (await service.client.get(f"/v1/videos/{video['id']}")).json()
    assert seen["status"] == "failed"
    assert seen["error"] == {"code": "generation_failed", "message": "values were not finite"}


@pytest.mark.parametrize(("method", "path"), OWNED)
@pytest.mark.parametrize("video_id", [UNKNOWN, "x", "..", "%00", "video_%F0%9F%8E%A5", "a" * 5000])
async def test_an_unknown_video_is_404(shared_service: Any, method: str, path: str, video_id: str) -> None:
    body = {"json": {"prompt": "a"}} if method == "POST" else {}
    response = await shared_service.client.request(method, f"/v1/videos/{video_id}{path}", **body)
    if method == "HEAD":
        assert response.status_code == 404
    elif video_id != "..":
        assert error_of(response, 404)["code"] == "video_not_found"
    else:
        assert response.status_code in (404, 405)


async def test_cancel_ends_a_queued_video_at_once(service: Any) -> None:
    video = await service.create()
    num_woken = len(service.num_woken)
    response = await service.client.post(f"/v1/videos/{video['id']}/cancel")
    assert response.status_code == 200
    cancelled = response.json()
    assert cancelled["completed_at"] is not None
    times = {name: cancelled[name] for name in ("completed_at", "expires_at")}
    assert cancelled == video | times | {"status": "cancelled"}
    assert len(service.num_woken) == num_woken + 1


async def test_cancel_of_a_running_video_reaches_its_worker(service: Any) -> None:
    video = await service.create()
    work = await service.claim()
    response = await service.client.post(f"/v1/videos/{video['id']}/cancel")
    assert (response.status_code, response.json()["status"]) == (200, "in_progress")
    assert await work.step(1) == {video["id"]}
    await work.cancelled()
    assert (await service.client.get(f"/v1/videos/{video['id']}")).json()["status"] == "cancelled"


async def test_cancel_of_an_ended_video_is_409_and_final(service: Any) -> None:
    video = await service.completed()
    response = await service.client.post(f"/v1/videos/{video['id']}/cancel")
    assert error_of(response, 409)["code"] == "video_ended"
    assert response.headers["x-should-retry"] == "false"


async def test_delete_removes_the_video_and_its_files(service: Any) -> None:
    video = await service.completed()
    path = (await service.jobs.get(video["id"])).artifacts["video"].path
    response = await service.client.delete(f"/v1/videos/{video['id']}")
    assert response.status_code == 200
    assert response.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
    with pytest.raises(T2VError):
        await service.artifacts.read(path)
    error_of(await service.client.get(f"/v1/videos/{video['id']}"), 404)
    error_of(await service.client.delete(f"/v1/videos/{video['id']}"), 404)


async def test_delete_stops_a_running_video_first(service: Any) -> None:
    async with service.working(step_s=0.2):
        video = await service.create()
        while (await service.jobs.get(video["id"])).status == "queued":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert (await service.client.delete(f"/v1/videos/{video['id']}")).status_code == 200
    error_of(await service.client.get(f"/v1/videos/{video['id']}"), 404)


async def test_delete_of_a_video_that_does_not_stop_is_409_and_worth_a_retry(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "_STOP_WITHIN_S", 0.1)
    video = await service.create()
    work = await service.claim()
    response = await service.client.delete(f"/v1/videos/{video['id']}")
    assert error_of(response, 409)["code"] == "video_not_ended"
    assert "x-should-retry" not in response.headers
    await work.cancelled()
    assert (await service.client.delete(f"/v1/videos/{video['id']}")).status_code == 200


async def test_a_remix_differs_in_the_prompt_alone(service: Any) -> None:
    settings = {"seed": 5, "size": "32x32", "sampler": "ddim", "format": "gif", "priority": "low", "num_frames": 3}
    video = await service.create(negative_prompt="blurry", metadata={"k": "v"}, **settings)
    response = await service.client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a blue square"})
    assert response.status_code == 200
    assert int(response.headers["openai-poll-after-ms"]) <= 1000
    remix = response.json()
    own = {"prompt": "a blue square", "remixed_from_video_id": video["id"], "metadata": {}}
    assert remix == video | own | {"id": remix["id"], "created_at": remix["created_at"]}
    assert remix["id"] != video["id"]


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": 7}, "prompt"), ({"prompt": "a", "seed": 1}, "seed")],
)
async def test_a_remix_takes_a_prompt_and_nothing_else(service: Any, body: dict[str, Any], param: str) -> None:
    video = await service.create()
    response = await service.client.post(f"/v1/videos/{video['id']}/remix", json=body)
    assert error_of(response, 400)["param"] == param


async def test_a_remix_is_json_of_bounded_size_and_counts_in_the_queue(run_service: Any) -> None:
    service = await run_service(limits=Limits(max_queued=1, max_body_bytes=1000))
    remix = f"/v1/videos/{(await service.create())['id']}/remix"
    error_of(await service.client.post(remix, files={"prompt": (None, "a")}), 415)
    error_of(await service.client.post(remix, json={"prompt": "a" * 1000}), 413)
    error_of(await service.client.post(remix, json={"prompt": "a"}), 429)


# -- lists -------------------------------------------------------------------------------------------------------------


async def test_lists_are_paged_in_both_orders(service: Any) -> None:
    ids = [(await service.create())["id"] for _ in range(5)]
    for order, expected in [("asc", ids), ("desc", ids[::-1])]:
        seen: list[str] = []
        after: dict[str, str] = {}
        num_pages = 0
        while num_pages < 9:
            num_pages += 1
            query = {"limit": "2", "order": order, **after}
            page = (await service.client.get("/v1/videos", params=query)).json()
            assert page["object"] == "list"
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            seen += [video["id"] for video in page["data"]]
            after = {"after": page["last_id"]}
            if not page["has_more"]:
                break
        assert (seen, num_pages) == (expected, 3)


async def test_an_empty_list_has_no_ids(shared_service: Any) -> None:
    page = (await shared_service.client.get("/v1/videos")).json()
    assert page == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize(
    ("name", "value"), [("limit", "0"), ("limit", "101"), ("limit", "x"), ("limit", "1" * 5000), ("order", "up")]
)
async def test_a_bad_query_is_400_that_names_it(shared_service: Any, name: str, value: str) -> None:
    error = error_of(await shared_service.client.get("/v1/videos", params={name: value}), 400)
    assert error["param"] == name
    assert error["message"].startswith(name)


async def test_a_page_after_an_unknown_video_is_404(shared_service: Any) -> None:
    error_of(await shared_service.client.get("/v1/videos", params={"after": UNKNOWN}), 404)


# -- sync --------------------------------------------------------------------------------------------------------------


async def test_sync_answers_with_the_video_and_its_seed(service: Any) -> None:
    service.gpu.may_finish.set()
    body = {"prompt": "a", "seed": 0, "size": "32x40", "seconds": 1}
    response = await service.client.post("/v1/videos/sync", json=body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "video/mp4"
    assert response.content == service.files.video
    made_with = {name: value for name, value in response.headers.items() if name.startswith("x-t2v-")}
    assert made_with == {
        "x-t2v-seed": "0",
        "x-t2v-model": "tiny",
        "x-t2v-size": "32x40",
        "x-t2v-num-frames": "4",
        "x-t2v-fps": "4",
    }
    assert service.gpu.asked[0].prompt == "a"
    assert await service.jobs.num_queued() == 0


async def test_sync_reads_multipart_too(service: Any) -> None:
    service.gpu.may_finish.set()
    response = await service.client.post("/v1/videos/sync", files={"prompt": (None, "a"), "seed": (None, "3")})
    assert response.headers["x-t2v-seed"] == "3"


async def test_a_disconnect_cancels_sync_within_100_ms(service: Any, caplog: Any) -> None:
    asking = asyncio.create_task(service.client.post("/v1/videos/sync", json={"prompt": "a"}))
    await service.gpu.started.wait()
    assert not service.gpu.stopped.is_set()
    asking.cancel()
    await asyncio.wait_for(service.gpu.stopped.wait(), 0.1)
    await asyncio.sleep(0.05)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("error", "status", "code", "is_final"),
    [
        (OutOfMemory("1024x1024: too large for this device; use a smaller size"), 400, "out_of_memory", False),
        (GenerationFailed("not finite: use bf16"), 500, "generation_failed", True),
        (Unavailable("no Generator: try again in a second"), 503, "unavailable", False),
    ],
)
async def test_what_goes_wrong_in_sync_is_told(
    service: Any, error: Exception, status: int, code: str, is_final: bool
) -> None:
    service.gpu.error = error
    service.gpu.may_finish.set()
    response = await service.client.post("/v1/videos/sync", json={"prompt": "a"})
    told = error_of(response, status)
    assert (told["message"], told["code"]) == (str(error), code)
    assert response.headers.get("x-should-retry") == ("false" if is_final else None)


@pytest.mark.parametrize("error", [RuntimeError("secret /root/x"), CheckpointError("secret /root/x")])
async def test_an_error_of_our_own_is_500_without_our_insides(service: Any, caplog: Any, error: Exception) -> None:
    service.gpu.error = error
    service.gpu.may_finish.set()
    response = await service.client.post("/v1/videos/sync", json={"prompt": "a"})
    told = error_of(response, 500)
    assert (told["type"], told["code"]) == ("server_error", "internal_error")
    assert "secret" not in response.text
    assert "secret" in caplog.text
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("priority", "urgent"), ("metadata", {"k": "v"}), ("seed", -1), ("size", "7x7")]
)
async def test_sync_refuses_what_it_cannot_honour(shared_service: Any, field: str, value: object) -> None:
    response = await shared_service.client.post("/v1/videos/sync", json={"prompt": "a", field: value})
    assert error_of(response, 400)["param"] == field


# -- keys --------------------------------------------------------------------------------------------------------------

NEED_A_KEY = [("POST", "/v1/videos"), ("GET", "/v1/videos"), ("POST", "/v1/videos/sync"), ("GET", "/v1/models")]


async def test_without_a_known_key_every_call_is_401(run_service: Any) -> None:
    service = await run_service(keys=KEYS)
    for method, path in NEED_A_KEY + [(method, f"/v1/videos/{UNKNOWN}{path}") for method, path in OWNED]:
        for header in (None, "", "Bearer", "Bearer wrong-key-0123456789", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x"):
            headers = {"authorization": header} if header is not None else {}
            response = await service.client.request(method, path, headers=headers)
            assert response.status_code == 401, (method, path, header)
            assert response.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert error_of(response, 401)["type"] == "authentication_error"


async def test_what_is_open_needs_no_key(run_service: Any) -> None:
    service = await run_service(keys=KEYS)
    for path in ("/", "/healthz", "/readyz", "/openapi.json"):
        assert (await service.client.get(path)).status_code == 200, path


@pytest.mark.parametrize(("method", "path"), OWNED)
async def test_another_keys_video_is_404_as_if_it_were_not_there(run_service: Any, method: str, path: str) -> None:
    service = await run_service(keys=KEYS, key=ALICE)
    video = await service.completed()
    bob = {"authorization": f"Bearer {BOB}"}
    body = {"json": {"prompt": "a"}} if method == "POST" else {}
    theirs, nobodys = [
        await service.client.request(method, f"/v1/videos/{video_id}{path}", headers=bob, **body)
        for video_id in (video["id"], UNKNOWN)
    ]
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.text.replace(video["id"], UNKNOWN) == nobodys.text
    assert (await service.client.get(f"/v1/videos/{video['id']}")).json() == video


async def test_a_list_holds_the_callers_videos_alone(run_service: Any) -> None:
    service = await run_service(keys=KEYS, key=ALICE)
    video = await service.create()
    bob = {"authorization": f"Bearer {BOB}"}
    assert [entry["id"] for entry in (await service.client.get("/v1/videos")).json()["data"]] == [video["id"]]
    assert (await service.client.get("/v1/videos", headers=bob)).json()["data"] == []
    error_of(await service.client.get("/v1/videos", params={"after": video["id"]}, headers=bob), 404)


async def test_two_keys_may_use_the_same_idempotency_key(run_service: Any) -> None:
    service = await run_service(keys=KEYS)
    ids = set()
    for key in (ALICE, BOB):
        headers = {"authorization": f"Bearer {key}", "idempotency-key": "k1"}
        ids.add((await service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers)).json()["id"])
    assert len(ids) == 2


# -- the service itself ------------------------------------------------------------------------------------------------


async def test_models_are_listed_with_the_default_first(shared_service: Any) -> None:
    models = (await shared_service.client.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == ["tiny", "other"]


async def test_ready_means_every_part_is(run_service: Any) -> None:
    service = await run_service()
    assert (await service.client.get("/readyz")).json() == {"ready": True, "parts": {"jobs": True, "generator": True}}
    service = await run_service(ready={"jobs": True, "generator": False})
    response = await service.client.get("/readyz")
    assert (response.status_code, response.json()["ready"]) == (503, False)
    assert (await service.client.get("/healthz")).json() == {"status": "ok"}


async def test_before_its_parts_are_there_it_is_alive_and_not_ready() -> None:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(create_app()), base_url="http://test") as client:
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        assert error_of(await client.get("/v1/videos"), 503)["code"] == "unavailable"


async def test_the_page_is_ours_alone(shared_service: Any) -> None:
    page = await shared_service.client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("app.js", "style.css"):
        assert name in page.text
        assert (await shared_service.client.get(f"/static/{name}")).status_code == 200


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/videos/", "/docs", "/static/nothing.js", "/static/../api.py"])
async def test_an_unknown_url_is_404_in_the_envelope(shared_service: Any, path: str) -> None:
    response = await shared_service.client.get(path, follow_redirects=False)
    assert response.status_code in (404, 307)
    if response.status_code == 404:
        assert error_of(response, 404)["code"] in ("unknown_url", "video_not_found")


@pytest.mark.parametrize(
    ("method", "path"), [("PUT", "/v1/videos"), ("GET", "/v1/videos/sync/"), ("PATCH", "/healthz")]
)
async def test_another_method_is_405_with_those_there_are(shared_service: Any, method: str, path: str) -> None:
    response = await shared_service.client.request(method, path)
    if response.status_code != 307:
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"]


def every_error(root: type[T2VError]) -> list[type[T2VError]]:
    return [root, *(error for child in root.__subclasses__() for error in every_error(child))]


def test_the_table_knows_every_error_of_a_caller() -> None:
    ours = {error for error in every_error(T2VError) if error.__module__ == "serve_app.errors"}
    assert ours - set(HTTP_ANSWERS) == {Superseded}  # which no caller meets


async def test_the_document_declares_bodies_errors_and_no_422_of_fastapi(shared_service: Any) -> None:
    document = (await shared_service.client.get("/openapi.json")).json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    create = document["paths"]["/v1/videos"]["post"]
    assert set(create["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert document["components"]["schemas"]["CreateVideo"]["additionalProperties"] is False
    assert create["security"] == [{"bearer": []}]
    for operations in document["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and "readiness" not in str(response).lower():
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
    names = [operation["operationId"] for operations in document["paths"].values() for operation in operations.values()]
    assert len(set(names)) == len(names)
