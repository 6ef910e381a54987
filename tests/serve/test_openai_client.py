"""OpenAI's own client, as it comes, against the service."""

import functools
import io
import json
from collections.abc import Callable
from typing import Any, TypeVar

import httpx2
import openai
import pytest
from anyio import to_thread
from api_service import ALICE, BOB, KEYS

from serve_app.api import Limits

pytestmark = pytest.mark.anyio

Result = TypeVar("Result")


def client_of(service: Any, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", **{"api_key": "unused", "max_retries": 2, **options})


async def call(function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
    """The client blocks, and the service runs in this thread."""
    return await to_thread.run_sync(functools.partial(function, *arguments, **named))


async def test_create_and_poll_ends_with_the_video(service: Any) -> None:
    client = client_of(service)
    async with service.working():
        video = await call(client.videos.create_and_poll, prompt="a red circle", seconds="4", size="64x48")  # type: ignore[arg-type]
    assert (video.status, video.progress, video.object) == ("completed", 100, "video")
    assert (video.model, video.seconds, video.size, video.prompt) == ("tiny", "4", "64x48", "a red circle")
    assert video.created_at <= video.completed_at < video.expires_at


async def test_our_own_fields_go_through_extra_body(service: Any) -> None:
    extra = {
        "seed": 7,
        "num_frames": 3,
        "guidance_scale": 2.5,
        "sampler": "ddim",
        "priority": "low",
        "metadata": {"order": "17"},
        "negative_prompt": None,
    }
    video = await call(client_of(service).videos.create, prompt="a", model="other", extra_body=extra)
    made_with = video.model_dump()
    assert {name: made_with[name] for name in extra} == extra | {"negative_prompt": ""}
    assert video.model == "other"


async def test_retrieve_tells_the_same_as_create(service: Any) -> None:
    client = client_of(service)
    video = await call(client.videos.create, prompt="a")
    again = await call(client.videos.retrieve, video.id)
    assert again.model_dump(exclude={"queue_position"}) == video.model_dump(exclude={"queue_position"})
    assert again.model_dump()["queue_position"] == 0


async def test_list_pages_by_itself(service: Any) -> None:
    client = client_of(service)
    ids = [(await service.create())["id"] for _ in range(5)]
    for order, expected in [("asc", ids), ("desc", ids[::-1])]:
        seen = await call(lambda order=order: [video.id for video in client.videos.list(limit=2, order=order)])
        assert seen == expected
    rest = await call(lambda: [video.id for video in client.videos.list(after=ids[3], order="asc")])
    assert rest == ids[4:]


async def test_all_videos_are_deleted_as_they_are_listed(service: Any) -> None:
    client = client_of(service)
    ids = {(await service.create())["id"] for _ in range(25)}  # more than a page

    def delete_all() -> set[str]:
        return {client.videos.delete(video.id).id for video in client.videos.list()}

    assert await call(delete_all) == ids


@pytest.mark.parametrize("variant", ["video", "thumbnail", "spritesheet"])
async def test_download_content_gives_each_variant(service: Any, variant: str) -> None:
    video = await service.completed()
    answer = await call(client_of(service).videos.download_content, video["id"], variant=variant)
    assert answer.read() == getattr(service.files, variant)


async def test_delete_removes_a_video(service: Any) -> None:
    client = client_of(service)
    video = await call(client.videos.create, prompt="a")
    answer = await call(client.videos.delete, video.id)
    assert (answer.id, answer.deleted, answer.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        await call(client.videos.retrieve, video.id)


async def test_remix_takes_over_the_seed(service: Any) -> None:
    client = client_of(service)
    video = await service.completed(seed=9)
    remix = await call(client.videos.remix, video["id"], prompt="a blue square")
    assert (remix.prompt, remix.remixed_from_video_id) == ("a blue square", video["id"])
    assert remix.model_dump()["seed"] == 9


async def test_a_cancelled_video_ends_polling(service: Any) -> None:
    client = client_of(service)
    video = await service.create()
    await service.client.post(f"/v1/videos/{video['id']}/cancel")
    assert (await call(client.videos.poll, video["id"])).status == "cancelled"


async def test_a_failed_video_has_its_error(service: Any) -> None:
    video = await service.create()
    await (await service.claim()).fail()
    failed = await call(client_of(service).videos.poll, video["id"])
    assert failed.error is not None
    assert (failed.status, failed.error.code) == ("failed", "generation_failed")


async def test_models_are_listed(service: Any) -> None:
    client = client_of(service)
    assert await call(lambda: [model.id for model in client.models.list()]) == ["tiny", "other"]


async def test_a_bad_request_is_raised_as_one_and_names_the_field(service: Any) -> None:
    client = client_of(service)
    for arguments, param in [
        ({"size": "63x64"}, "size"),
        ({"seconds": "long"}, "seconds"),
        ({"model": "sora-2"}, "model"),
        ({"extra_body": {"webhook_url": "x"}}, "webhook_url"),
        ({"input_reference": ("a.png", io.BytesIO(b"PNG"), "image/png")}, "input_reference"),
        # The client itself refuses the documented object form here, so it is sent as its types spell it.
        ({"extra_body": {"input_reference": {"image_url": "https://example.com/a.png"}}}, "input_reference"),
    ]:
        with pytest.raises(openai.BadRequestError) as raised:
            await call(client.videos.create, prompt="a", **arguments)
        assert (raised.value.status_code, raised.value.param) == (400, param)
        assert (raised.value.type, raised.value.code) == ("invalid_request_error", "invalid_value")


async def test_a_wrong_key_is_an_authentication_error(run_service: Any) -> None:
    service = await run_service(keys=KEYS)
    with pytest.raises(openai.AuthenticationError):
        await call(client_of(service).videos.create, prompt="a")
    assert (await call(client_of(service, api_key=ALICE).videos.create, prompt="a")).status == "queued"


async def test_another_keys_video_is_not_found(run_service: Any) -> None:
    service = await run_service(keys=KEYS, key=ALICE)
    video = await service.completed()
    bob = client_of(service, api_key=BOB).videos
    for function, named in [
        (bob.retrieve, {}),
        (bob.delete, {}),
        (bob.download_content, {}),
        (bob.remix, {"prompt": "a"}),
    ]:
        with pytest.raises(openai.NotFoundError):
            await call(function, video["id"], **named)


async def test_content_that_is_not_ready_is_a_conflict_at_once(service: Any) -> None:
    video = await service.create()
    answers: list[httpx2.Response] = []
    with httpx2.Client(event_hooks={"response": [answers.append]}) as http_client:
        client = client_of(service, max_retries=5, http_client=http_client)
        with pytest.raises(openai.ConflictError) as raised:
            await call(client.videos.download_content, video["id"])
    assert raised.value.code == "video_not_ready"
    assert len(answers) == 1, "the client tried again"


async def test_a_full_queue_is_a_rate_limit_that_the_client_waits_out(run_service: Any) -> None:
    service = await run_service(limits=Limits(max_queued=1))
    first = await service.create()
    with pytest.raises(openai.RateLimitError):
        await call(client_of(service, max_retries=0).videos.create, prompt="a")
    await service.client.delete(f"/v1/videos/{first['id']}")
    assert (await call(client_of(service).videos.create, prompt="a")).status == "queued"


async def test_an_idempotency_key_makes_retries_safe(service: Any) -> None:
    client = client_of(service)
    headers = {"idempotency-key": "k1"}
    ids = {(await call(client.videos.create, prompt="a", extra_headers=headers)).id for _ in range(2)}
    assert len(ids) == 1
    with pytest.raises(openai.UnprocessableEntityError):
        await call(client.videos.create, prompt="b", extra_headers=headers)


async def test_the_async_client_works_too(service: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="unused") as client, service.working():
        video = await client.videos.create_and_poll(prompt="a", poll_interval_ms=20)
        assert (await client.videos.download_content(video.id)).content == service.files.video
        assert json.loads((await client.videos.with_raw_response.retrieve(video.id)).text)["status"] == "completed"
