"""Who may ask: a key sees its own videos and nothing else."""

from typing import Any

import pytest
from api_service import ALICE, BOB, KEYS, OWNED, UNKNOWN, error_of

pytestmark = pytest.mark.anyio


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


# Other sites' pages, where there are no keys


CHANGING = [("POST", "/v1/videos"), ("POST", "/v1/videos/sync"), ("POST", "/v1/videos/edits")] + [
    (method, f"/v1/videos/{UNKNOWN}{path}") for method, path in OWNED if method in ("POST", "DELETE")
]
EVIL = "https://evil.example"


@pytest.mark.parametrize(("method", "path"), CHANGING)
async def test_without_keys_a_page_of_another_site_changes_nothing(shared_service: Any, method: str, path: str) -> None:
    form = {"files": {"prompt": (None, "a")}} if method == "POST" else {}  # which a browser sends without asking
    for headers in ({"origin": EVIL, "sec-fetch-site": "cross-site"}, {"origin": EVIL}, {"origin": "null"}):
        response = await shared_service.client.request(method, path, headers=headers, **form)
        error = error_of(response, 403)
        assert error["code"] == "cross_site_request"
        assert "keys" in error["message"]
    assert await shared_service.jobs.num_queued() == 0


@pytest.mark.parametrize(
    "headers",
    [
        {},  # no browser
        {"origin": "http://proxy.example", "host": "127.0.0.1:9", "sec-fetch-site": "same-origin"},
        {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"origin": "http://video.lan", "host": "video.lan"},  # browsers judge https and this machine alone
        {"origin": "http://[fd00::1]:8000", "host": "[fd00::1]:8000"},
        {"origin": "http://video.lan", "host": "127.0.0.1:9", "x-forwarded-host": "video.lan, inner.lan"},
    ],
)
async def test_its_own_page_and_who_is_no_page_may(service: Any, headers: dict[str, str]) -> None:
    response = await service.client.post("/v1/videos", files={"prompt": (None, "a")}, headers=headers)
    assert response.status_code == 200, response.text
    assert (await service.client.delete(f"/v1/videos/{response.json()['id']}", headers=headers)).status_code == 200


@pytest.mark.parametrize("origin", ["", "http://[", "//", "http://127.0.0.1.evil.example", "http://evil.example:x"])
async def test_an_origin_that_is_none_of_ours_is_another_site(shared_service: Any, origin: str) -> None:
    response = await shared_service.client.post("/v1/videos", json={"prompt": "a"}, headers={"origin": origin})
    error_of(response, 403)


async def test_who_has_a_key_may_ask_from_any_page(run_service: Any) -> None:
    service = await run_service(keys=KEYS, key=ALICE)
    headers = {"origin": EVIL, "sec-fetch-site": "cross-site"}
    response = await service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers)
    assert response.status_code == 200


async def test_two_keys_may_use_the_same_idempotency_key(run_service: Any) -> None:
    service = await run_service(keys=KEYS)
    ids = set()
    for key in (ALICE, BOB):
        headers = {"authorization": f"Bearer {key}", "idempotency-key": "k1"}
        ids.add((await service.client.post("/v1/videos", json={"prompt": "a"}, headers=headers)).json()["id"])
    assert len(ids) == 2
