"""Bodies that are refused: bad values of every field, damage, other types, too many bytes."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from api_service import error_of

from serve_app.api import create_app

pytestmark = pytest.mark.anyio


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
    ("webhook_url", "http://example.com", "https://"),
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


def test_the_guide_has_every_call_and_no_other() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    paths = create_app().openapi()["paths"]
    calls = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert set(re.findall("^## ([A-Z]+ /.*)$", guide, flags=re.MULTILINE)) == calls


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
