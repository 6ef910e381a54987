"""Webhooks reach their receivers at least once, signed, and nobody whom they must not reach."""

import asyncio
import ipaddress
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime

import httpx2
import pytest
from api_service import ALICE, KEYS, running
from openai import OpenAI
from sqlalchemy import text
from standardwebhooks import Webhook, WebhookVerificationError

from serve_app.config import WebhooksConfig
from serve_app.jobs import JobStore, NewJob, Outbox, new_job_id
from serve_app.webhooks import Deliverer, check_url, is_public, signing_secret
from t2v_core.errors import InvalidRequest

pytestmark = pytest.mark.anyio
SECRET = "a secret of sixteen"
CONFIG = WebhooksConfig(secret=SECRET, allow_private=True, timeout_s=30, retry_delays_s=(0.05, 0.05, 0.05))
IMPATIENT = CONFIG.model_copy(update={"timeout_s": 1.0})  # for receivers that do not answer

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Receiver:
    """Somebody's server: what it got, and how it answers one after the other."""

    def __init__(self, *answers: Answer) -> None:
        self.got: list[tuple[dict[str, str], str]] = []
        self._answers = list(answers)
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            body = (await reader.readexactly(int(headers["content-length"]))).decode()
            self.got.append((headers, body))
            await (self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])(writer)
        writer.close()


def says(answer: bytes) -> Answer:
    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()

    return write


async def nothing(_: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def without_end(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def drop_by_drop(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.1)


OK, BROKEN = says(b"HTTP/1.1 204 No Content\r\n\r\n"), says(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")
GONE = says(b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n")
ELSEWHERE = says(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n")
NO_HTTP = says(b"SSH-2.0-OpenSSH_9.9\r\n")


@asynccontextmanager
async def receiving(*answers: Answer) -> AsyncIterator[Receiver]:
    receiver = Receiver(*answers)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook?token=1"
    try:
        yield receiver
    finally:
        server.close()


@pytest.fixture
async def jobs(tmp_path) -> AsyncIterator[JobStore]:
    store = await JobStore.open(f"sqlite:///{tmp_path}/jobs.db")
    yield store
    await store.close()


async def end_one(jobs: JobStore, url: str | None, owner: str = "alice") -> str:
    """A job that has ended: it was cancelled."""
    new = NewJob(
        id=new_job_id(),
        owner=owner,
        model="tiny",
        prompt="A panda.",
        params={"num_inference_steps": 5},
        priority="normal",
        metadata={"mine": "yes"},
        remixed_from=None,
        input_path=None,
        idempotency_key=None,
        body_hash=None,
        webhook_url=url,
    )
    await jobs.create(new)
    await jobs.cancel(new.id, owner)
    return new.id


@asynccontextmanager
async def delivering(jobs: JobStore, config: WebhooksConfig = CONFIG) -> AsyncIterator[Deliverer]:
    deliverer = Deliverer(Outbox(jobs.database), config)

    async def work() -> None:
        while True:
            await deliverer.begin_due()
            await asyncio.sleep(0.01)

    task = asyncio.create_task(work())
    try:
        yield deliverer
    finally:
        task.cancel()
        await deliverer.close()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)


def resolve_to(
    monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str, wait: Callable[[], object] = lambda: None
) -> list[str]:
    """Have a name lead to these addresses, once `wait` returns. The list grows with every time it is asked for."""
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def resolve_this(host, port, *args, **kwargs):
        if host != name:
            return resolve(host, port, *args, **kwargs)
        asked.append(host)
        wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve_this)
    return asked


async def rows(jobs: JobStore) -> list[tuple[float | None, float | None, int]]:
    async with jobs.database.reading() as connection:
        found = await connection.execute(text("SELECT next_at, delivered_at, attempts FROM outbox ORDER BY id"))
        return [tuple(row) for row in found]


async def settled(jobs: JobStore, number: int = 1) -> list[tuple[float | None, float | None, int]]:
    """The outbox once so many messages are delivered or given up."""
    async with asyncio.timeout(15):
        while True:
            found = await rows(jobs)
            if sum(next_at is None for next_at, _, _ in found) >= number:
                return found
            await asyncio.sleep(0.01)


async def test_a_message_arrives_once_and_its_signature_holds(jobs):
    async with receiving(OK) as receiver, delivering(jobs):
        job_id = await end_one(jobs, receiver.url)
        ((_, delivered_at, attempts),) = await settled(jobs)
        await asyncio.sleep(0.1)
    assert delivered_at is not None
    assert attempts == 1
    ((headers, body),) = receiver.got
    event = Webhook(signing_secret(SECRET, "alice")).verify(body, headers)
    assert event["type"] == "video.cancelled"
    assert event["data"] == {"id": job_id, "status": "cancelled", "metadata": {"mine": "yes"}, "error": None}
    assert abs(event["created_at"] - datetime.now(UTC).timestamp()) < 60
    with pytest.raises(WebhookVerificationError):
        Webhook(signing_secret(SECRET, "bob")).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(signing_secret(SECRET, "alice")).verify(body.replace("cancelled", "completed"), headers)


async def test_the_official_openai_client_verifies_it(jobs):
    async with receiving(OK) as receiver, delivering(jobs):
        await end_one(jobs, receiver.url)
        await settled(jobs)
    ((headers, body),) = receiver.got
    client = OpenAI(api_key="none", webhook_secret=signing_secret(SECRET, "alice"))
    client.webhooks.verify_signature(body, headers)


async def test_a_job_without_a_url_tells_nobody(jobs):
    await end_one(jobs, None)
    assert await rows(jobs) == [(None, None, None)]
    async with delivering(jobs):
        await asyncio.sleep(0.1)
    assert await rows(jobs) == [(None, None, None)]


@pytest.mark.parametrize(
    "trouble", [BROKEN, nothing, drop_by_drop, NO_HTTP, ELSEWHERE], ids=["500", "silent", "slow", "no http", "302"]
)
async def test_a_receiver_in_trouble_gets_the_same_message_again(jobs, trouble):
    async with receiving(trouble, OK) as receiver, delivering(jobs, IMPATIENT):
        await end_one(jobs, receiver.url)
        ((_, delivered_at, attempts),) = await settled(jobs)
    assert delivered_at is not None
    assert attempts == 2
    (first, second) = receiver.got
    assert first[0]["webhook-id"] == second[0]["webhook-id"]
    assert first[1] == second[1]
    for headers, body in receiver.got:
        Webhook(signing_secret(SECRET, "alice")).verify(body, headers)


async def test_one_that_is_down_gets_it_when_it_is_up(jobs, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with delivering(jobs):
        await end_one(jobs, f"http://127.0.0.1:{port}/")
        async with asyncio.timeout(10):
            while (await rows(jobs))[0][2] == 0:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.01)
        receiver = Receiver(OK)
        server = await asyncio.start_server(receiver.serve, "127.0.0.1", port)
        ((_, delivered_at, _),) = await settled(jobs)
        server.close()
    assert delivered_at is not None
    assert len(receiver.got) == 1


async def test_an_endless_answer_is_not_read(jobs):
    async with receiving(without_end) as receiver, delivering(jobs):
        await end_one(jobs, receiver.url)
        ((_, delivered_at, _),) = await settled(jobs)
    assert delivered_at is not None


@pytest.mark.parametrize(("answer", "attempts"), [(BROKEN, 4), (GONE, 1)], ids=["always 500", "gone"])
async def test_it_is_given_up_in_the_end(jobs, answer, attempts):
    async with receiving(answer) as receiver, delivering(jobs):
        await end_one(jobs, receiver.url)
        ((_, delivered_at, found),) = await settled(jobs)
    assert delivered_at is None
    assert found == len(receiver.got) == attempts


async def test_a_slow_receiver_holds_up_no_other(jobs):
    async with receiving(nothing) as silent, receiving(OK) as quick, delivering(jobs):
        await end_one(jobs, silent.url)
        await until(lambda: bool(silent.got))
        await end_one(jobs, quick.url)
        await until(lambda: bool(quick.got))


async def test_what_was_under_way_when_a_deliverer_died_is_sent_by_the_next(jobs):
    async with receiving(nothing, OK) as receiver:
        async with delivering(jobs, IMPATIENT):
            await end_one(jobs, receiver.url)
            await until(lambda: bool(receiver.got))
        async with delivering(jobs):
            ((_, delivered_at, _),) = await settled(jobs)
    assert delivered_at is not None
    assert receiver.got[0][0]["webhook-id"] == receiver.got[1][0]["webhook-id"]


async def test_of_two_deliverers_one_sends_it(jobs):
    async with receiving(OK) as receiver, delivering(jobs), delivering(jobs):
        for _ in range(20):
            await end_one(jobs, receiver.url)
        await settled(jobs, 20)
    ids = [headers["webhook-id"] for headers, _ in receiver.got]
    assert len(ids) == len(set(ids)) == 20


async def test_settled_messages_are_forgotten_after_a_while_and_others_never(jobs):
    await end_one(jobs, None)
    await end_one(jobs, "https://example.com")
    await Outbox(jobs.database).forget(older_than_s=60)
    assert len(await rows(jobs)) == 2
    await Outbox(jobs.database).forget(older_than_s=-1)
    ((next_at, _, _),) = await rows(jobs)
    assert next_at is not None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "https://"),
        ("ftp://example.com/", "https://"),
        ("https://", "https://"),
        ("example.com", "https://"),
        ("https://user:password@example.com/", "no user name"),
        ("https://127.0.0.1/", "private"),
        ("https://localhost/", "private"),
        ("https://10.1.2.3/", "private"),
        ("https://169.254.169.254/latest/meta-data", "private"),
        ("https://[::1]/", "private"),
        ("https://[::ffff:10.0.0.1]/", "private"),
        ("https://[64:ff9b::7f00:1]/", "private"),
        ("https://example.com/" + "x" * 3000, "2048"),
        ("https://example.com:99999999/", "65535"),
    ],
)
def test_a_url_that_must_not_be_told_is_refused(url, why):
    with pytest.raises(InvalidRequest, match=why) as refused:
        check_url(url, WebhooksConfig(secret=SECRET))
    assert refused.value.param == "webhook_url"


def test_without_a_secret_no_url_is_accepted():
    with pytest.raises(InvalidRequest, match=r"webhooks\.secret"):
        check_url("https://example.com/", WebhooksConfig())
    check_url("https://example.com/", WebhooksConfig(secret=SECRET))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("192.168.0.1", False),
        ("224.0.0.1", False),
        ("fd00::1", False),
        ("fe80::1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::808:808", False),  # a translator of a network's own
        ("fec0::1", False),
        ("::808:808", False),
        ("::ffff:8.8.8.8", True),
    ],
)
def test_which_addresses_are_public(address, expected):
    assert is_public(ipaddress.ip_address(address)) is expected


async def test_a_name_that_turns_out_to_be_private_is_not_called(jobs, monkeypatch):
    async with receiving(OK) as receiver:
        port = int(httpx2.URL(receiver.url).port or 0)
        resolve_to(monkeypatch, "rebound.example", "127.0.0.1")
        guarded = CONFIG.model_copy(update={"allow_private": False})
        async with delivering(jobs, guarded):
            await end_one(jobs, f"http://rebound.example:{port}/")
            ((_, delivered_at, attempts),) = await settled(jobs)
        assert delivered_at is None
        assert attempts == 4
        assert not receiver.got
        async with delivering(jobs):  # the same name, where private ones may be told
            await end_one(jobs, f"http://rebound.example:{port}/")
            await settled(jobs, 2)
        assert len(receiver.got) == 1


async def test_names_that_resolve_slowly_hold_up_no_other(jobs, monkeypatch):
    let_go = threading.Event()
    asked = resolve_to(monkeypatch, "slow.example", "127.0.0.1", wait=let_go.wait)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(2))  # of a replica with little of a machine
    try:
        async with receiving(OK) as receiver, delivering(jobs):
            for _ in range(4):
                await end_one(jobs, "http://slow.example/")
            await until(lambda: len(asked) == 4)
            await end_one(jobs, receiver.url.replace("127.0.0.1", "localhost"), "bob")
            await until(lambda: bool(receiver.got))
            async with asyncio.timeout(5):
                await loop.getaddrinfo("localhost", 5432)  # as for a new connection to the database
    finally:
        let_go.set()


async def test_an_address_that_swallows_everything_leaves_the_next_its_time(jobs, monkeypatch):
    async with receiving(OK) as receiver:
        port = int(httpx2.URL(receiver.url).port or 0)
        resolve_to(monkeypatch, "both.example", "127.0.0.2", "127.0.0.1")
        with socket.create_server(("127.0.0.2", port), backlog=0), ExitStack() as stack:
            for _ in range(4):  # more than it has places for: it answers no other
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.2", port))
            async with delivering(jobs, CONFIG.model_copy(update={"timeout_s": 2.0})):
                await end_one(jobs, f"http://both.example:{port}/")
                ((_, delivered_at, attempts),) = await settled(jobs)
    assert delivered_at is not None
    assert attempts == 1


async def test_a_database_of_an_earlier_version_is_brought_up_to_date(tmp_path):
    url = f"sqlite:///{tmp_path}/old.db"
    store = await JobStore.open(url)
    await end_one(store, None)
    async with store.database.writing() as connection:
        await connection.execute(text("ALTER TABLE jobs DROP COLUMN webhook_url"))
        await connection.execute(text("DROP INDEX outbox_by_next"))
        for column in ("owner", "url", "body", "next_at", "attempts", "delivered_at"):
            await connection.execute(text(f"ALTER TABLE outbox DROP COLUMN {column}"))
    await store.close()
    store = await JobStore.open(url)
    await end_one(store, "https://example.com")
    assert len((await store.list("alice")).jobs) == 2
    assert len(await rows(store)) == 2
    await store.close()


async def test_the_api_takes_a_url_and_refuses_a_private_one(tmp_path, files):
    async with running(tmp_path, files, keys=KEYS, key=ALICE) as service:
        body = {"prompt": "A panda.", "webhook_url": "https://127.0.0.1/"}
        refused = await service.client.post("/v1/videos", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "webhook_url"
        body["webhook_url"] = "https://example.com/hook"
        accepted = (await service.client.post("/v1/videos", json=body)).raise_for_status().json()
        assert (await service.jobs.get(accepted["id"])).webhook_url == "https://example.com/hook"
        await service.client.post(f"/v1/videos/{accepted['id']}/cancel")
        async with service.jobs.database.reading() as connection:
            row = (await connection.execute(text("SELECT url, body FROM outbox"))).one()
        assert row.url == "https://example.com/hook"
        assert json.loads(row.body)["data"]["id"] == accepted["id"]


async def test_the_same_key_with_another_url_is_another_request(tmp_path, files):
    async with running(tmp_path, files) as service:
        headers = {"Idempotency-Key": "one"}
        for url, status in (("https://a.example/", 200), ("https://a.example/", 200), ("https://b.example/", 422)):
            body = {"prompt": "A panda.", "seed": 1, "webhook_url": url}
            assert (await service.client.post("/v1/videos", json=body, headers=headers)).status_code == status


async def test_one_who_is_told_much_leaves_the_others_their_share(jobs):
    for _ in range(20):
        await end_one(jobs, "http://127.0.0.1:1/", "alice")
    await end_one(jobs, "http://127.0.0.1:1/", "bob")
    outbox = Outbox(jobs.database)

    async def owners(limit: int, **in_flight: int) -> list[str]:
        claimed = await outbox.claim(limit=limit, lease_s=60, in_flight=in_flight, max_per_owner=8)
        return sorted(delivery.owner for delivery in claimed)

    assert await owners(64, alice=6) == ["alice"] * 2 + ["bob"]
    assert await owners(64, alice=8, bob=1) == []
    assert await owners(3) == ["alice"] * 3
    assert await owners(64) == ["alice"] * 8
