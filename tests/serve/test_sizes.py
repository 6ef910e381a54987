"""How large a video may be, who says so, and that the refusal tells it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from api_service import Files, error_of, running

from serve_app.api import Limits
from serve_app.memory import free_bytes
from serve_app.sizes import SizeLimit, configured, measured, smallest
from t2v_core.engine import Profile
from t2v_core.engine.profile import Measurement
from t2v_core.shapes import VideoShape

SHAPE = VideoShape(16, 256, 256).latents()
LIMIT = SizeLimit(64 * 64 * 8, "measured on cpu: 1.0 GiB free, 300 bytes a pixel")


def profile_of(**memory_bytes: int) -> Profile:
    """With what was taken by so many rows: rows_2=..."""
    measurements = [
        Measurement(shape=SHAPE, rows=int(rows.removeprefix("rows_")), step_s=1.0, memory_bytes=memory)
        for rows, memory in memory_bytes.items()
    ]
    return Profile(device="NVIDIA H100", dtype="torch.float16", measurements=tuple(measurements))


def test_a_video_fits_that_takes_as_much_as_the_largest_measured_step() -> None:
    limit = measured(profile_of(rows_2=2**30, rows_8=2**31), free_bytes=2**31)
    assert limit is not None
    assert limit.max_pixel_frames == 4 * 16 * 256 * 256  # as 8 rows are 4 videos with guidance
    assert limit.source == "measured on NVIDIA H100: 2.0 GiB free, 512 bytes a pixel"


def test_where_memory_was_not_measured_there_is_no_limit() -> None:
    assert measured(profile_of(rows_2=0), free_bytes=2**31) is None
    assert configured(None) is None


def test_the_smallest_denoiser_decides() -> None:
    small, large = SizeLimit(10, "a"), SizeLimit(20, "b")
    assert smallest([large, None, small]) == small
    assert smallest([None]) is None
    assert smallest([]) is None


def test_the_free_memory_of_a_machine_is_less_than_all_of_it() -> None:
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < free_bytes(torch.device("cpu")) < total * 1024


@pytest.mark.anyio
async def test_a_measured_limit_holds_for_every_way_to_a_video(tmp_path: Path, files: Files) -> None:
    async with running(tmp_path, files, limits=Limits(), measured_limit=LIMIT) as service:
        fitting = await service.create(size="64x64", num_frames=8)
        too_large: dict[str, Any] = {"prompt": "a", "size": "64x64", "num_frames": 9}
        for path in ("/v1/videos", "/v1/videos/sync"):
            error = error_of(await service.client.post(path, json=too_large), 400)
            assert error["param"] == "size"
            assert error["message"] == (
                "9 frames of 64x64 are 36864 pixels: this service makes at most 32768 "
                "(measured on cpu: 1.0 GiB free, 300 bytes a pixel); ask for a smaller size or fewer frames"
            )
        assert (await service.client.post(f"/v1/videos/{fitting['id']}/remix", json={"prompt": "b"})).status_code == 200


@pytest.mark.anyio
async def test_a_remix_must_fit_now(tmp_path: Path, files: Files) -> None:
    async with running(tmp_path, files, limits=Limits()) as service:
        earlier = await service.create(size="64x64", num_frames=9)
    async with running(tmp_path, files, limits=Limits(), measured_limit=LIMIT) as service:
        answer = await service.client.post(f"/v1/videos/{earlier['id']}/remix", json={"prompt": "b"})
        assert error_of(answer, 400)["param"] == "size"


@pytest.mark.anyio
@pytest.mark.parametrize("max_pixel_frames", [64 * 64, 64 * 64 * 64])
async def test_the_operators_limit_counts_before_a_measured_one(
    tmp_path: Path, files: Files, max_pixel_frames: int
) -> None:
    limits = Limits(max_pixel_frames=max_pixel_frames)
    async with running(tmp_path, files, limits=limits, measured_limit=LIMIT) as service:
        num_frames = max_pixel_frames // (64 * 64)
        await service.create(size="64x64", num_frames=num_frames)
        body = {"prompt": "a", "size": "64x64", "num_frames": num_frames + 1}
        message = error_of(await service.client.post("/v1/videos", json=body), 400)["message"]
        assert f"at most {max_pixel_frames} (set by ingress.max_pixel_frames)" in message
