"""A video in the answer itself, and what is told when it cannot be made."""

import asyncio
import math
import time
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
from api_service import error_of

from serve_app.errors import Unavailable
from t2v_core.errors import CheckpointError, GenerationFailed, OutOfMemory

pytestmark = pytest.mark.anyio


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


@pytest.mark.parametrize(
    ("model", "told"), [("модель", quote("модель")), ("100%\n", "100%25%0A"), ("a b/c-1.7@2:3", "a b/c-1.7@2:3")]
)
async def test_sync_names_its_model_whatever_the_name(service: Any, model: str, told: str) -> None:
    service.app.state.parts = replace(service.app.state.parts, models=(model,))
    service.gpu.may_finish.set()
    response = await service.client.post("/v1/videos/sync", json={"prompt": "a"})
    assert response.status_code == 200
    assert response.headers["x-t2v-model"] == told


async def test_sync_reads_multipart_too(service: Any) -> None:
    service.gpu.may_finish.set()
    response = await service.client.post("/v1/videos/sync", files={"prompt": (None, "a"), "seed": (None, "3")})
    assert response.headers["x-t2v-seed"] == "3"


async def test_a_disconnect_cancels_sync_within_100_ms(service: Any, caplog: Any) -> None:
    fastest_s = math.inf
    for _ in range(5):  # a busy machine may be late once
        service.gpu.started.clear()
        service.gpu.stopped.clear()
        asking = asyncio.create_task(service.client.post("/v1/videos/sync", json={"prompt": "a"}))
        await service.gpu.started.wait()
        assert not service.gpu.stopped.is_set()
        left = time.monotonic()
        asking.cancel()
        await asyncio.wait_for(service.gpu.stopped.wait(), 5)
        fastest_s = min(fastest_s, time.monotonic() - left)
    assert fastest_s < 0.1
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
