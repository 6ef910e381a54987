"""Every route and what it answers. The service's client holds each answer against /openapi.json."""

import asyncio
from importlib import metadata
from typing import Any

import httpx2
import pytest
from api_service import ALICE, BOB, KEYS, OWNED, UNKNOWN, error_of
from sqlalchemy import update

from serve_app import videos
from serve_app.api import Limits, create_app
from serve_app.errors import HTTP_ANSWERS, Superseded, Unavailable
from serve_app.jobs.schema import jobs as table
from t2v_core.errors import T2VError

pytestmark = pytest.mark.anyio


# Create


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
        "strength": None,
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


# Idempotency and the queue's limits


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


# One video


async def test_a_video_is_followed_from_the_queue_to_its_end(service: Any) -> None:
    async def get() -> dict[str, Any]:
        response = await service.client.get(f"/v1/videos/{video['id']}")
        assert 0 < int(response.headers["openai-poll-after-ms"]) <= 1000
        return dict(response.json())

    other, video = await service.create(), await service.create()
    assert ((await get())["status"], (await get())["queue_position"]) == ("queued", 1)
    await service.client.delete(f"/v1/videos/{other['id']}")
    await asyncio.sleep(0.05)  # places are told as they were a moment ago
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


async def test_a_delete_while_the_files_store_is_away_leaves_them_to_the_sweeper(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = await service.completed()

    async def away(*_: Any) -> None:
        raise Unavailable("the artifact store does not answer")

    monkeypatch.setattr(service.artifacts, "delete_prefix", away)
    assert (await service.client.delete(f"/v1/videos/{video['id']}")).status_code == 200
    error_of(await service.client.get(f"/v1/videos/{video['id']}"), 404)


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


async def test_a_remix_of_a_model_that_is_not_served_any_more_says_what_to_do(service: Any) -> None:
    video = await service.create()
    async with service.jobs.database.writing() as connection:
        await connection.execute(update(table).values(model="gone"))
    response = await service.client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a"})
    error = error_of(response, 400)
    assert error["param"] == "video_id"
    assert "was made by gone" in error["message"]


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


# Lists


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
    error = error_of(await shared_service.client.get("/v1/videos", params={"after": UNKNOWN}), 404)
    assert (error["code"], error["param"]) == ("video_not_found", "after")


# The service itself


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


def test_the_service_is_made_of_its_source_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a Ray job's `working_dir` brings without installing it, and with it no version."""
    assert create_app().version == metadata.version("t2v-serve")
    monkeypatch.setattr(metadata.Distribution, "discover", lambda **_: iter([]))
    assert create_app().version == "unknown"
