"""One suite for both kinds of store, on a real folder and a real S3 endpoint; then what is particular to each."""

import asyncio
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from serve_app.artifacts import ArtifactStore
from serve_app.errors import ArtifactGone, Unavailable
from serve_app.jobs.model import Artifact
from t2v_core.errors import InvalidRequest

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

JOB = "video_0123456789abcdef0123456789abcdef"
VIDEO = f"{JOB}/1/video.mp4"
KEYS = {"key": "test", "secret": "test"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Place:
    """Somewhere to keep files, as the service opens it and as it is from outside."""

    url: str
    open: Callable[[], ArtifactStore]
    names: Callable[[], list[str]]
    age: Callable[[str, float], None]


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    root = tmp_path / "store"

    def age(path: str, by_s: float) -> None:
        then = time.time() - by_s
        os.utime(root / path, (then, then))

    def names() -> list[str]:
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    return Place(str(root), lambda: ArtifactStore(str(root)), names, age)


@pytest.fixture
def bucket(s3_url: str, request: pytest.FixtureRequest) -> Place:
    name = f"bucket-{random.randbytes(6).hex()}"
    store = s3_backends["123456789012"]["aws"]
    store.create_bucket(name, "us-east-1")

    def key(path: str) -> Any:
        return store.buckets[name].keys[f"some/videos/{path}"]

    def age(path: str, by_s: float) -> None:
        key(path).last_modified -= timedelta(seconds=by_s)

    def names() -> list[str]:
        return sorted(path.removeprefix("some/videos/") for path in store.buckets[name].keys)

    url = f"s3://{name}/some/videos"
    options = {"endpoint_url": s3_url, "skip_instance_cache": True, **KEYS}  # as if each were of another process
    return Place(url, lambda: ArtifactStore(url, options), names, age)


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(request.param)


@pytest.fixture
def store(place: Place) -> ArtifactStore:
    return place.open()


# Both


@pytest.mark.parametrize("size", [0, 1, 1000, 9_000_000])
async def test_what_was_put_is_read(store: ArtifactStore, size: int) -> None:
    data = random.Random(0).randbytes(size)
    artifact = await store.put(VIDEO, data, "video/mp4")
    assert artifact == Artifact(VIDEO, "video/mp4", size, hashlib.sha256(data).hexdigest())
    assert await store.read(VIDEO) == data


async def test_a_second_put_replaces_the_first(place: Place, store: ArtifactStore) -> None:
    await store.put(VIDEO, b"long and old", "video/mp4")
    await store.put(VIDEO, b"new", "video/mp4")
    assert await store.read(VIDEO) == b"new"
    assert place.names() == [VIDEO]


async def test_another_process_sees_writes_and_deletes_at_once(place: Place, store: ArtifactStore) -> None:
    other = place.open()
    assert await other.prefixes(-60) == []
    with pytest.raises(ArtifactGone):
        await other.read(VIDEO)
    await store.put(VIDEO, b"1", "video/mp4")
    assert await other.prefixes(-60) == [f"{JOB}/1"]
    await store.put(f"{JOB}/2/video.mp4", b"2", "video/mp4")
    assert await other.prefixes(-60) == [f"{JOB}/1", f"{JOB}/2"]
    assert await other.read(f"{JOB}/2/video.mp4") == b"2"
    await other.delete_prefix(JOB)
    assert await store.prefixes(-60) == []


@pytest.mark.parametrize(
    ("start", "end"), [(0, 10), (0, 3), (3, 7), (9, 10), (7, 99), (10, 99), (50, 99), (4, 4), (0, 0)]
)
async def test_a_range_is_that_slice(store: ArtifactStore, start: int, end: int) -> None:
    await store.put(VIDEO, b"0123456789", "video/mp4")
    assert await store.read_range(VIDEO, start, end) == b"0123456789"[start:end]


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (-5, -1)])
async def test_a_range_that_is_none_is_refused(store: ArtifactStore, start: int, end: int) -> None:
    await store.put(VIDEO, b"0123456789", "video/mp4")
    with pytest.raises(InvalidRequest, match=f"bytes {start} to {end}"):
        await store.read_range(VIDEO, start, end)


@pytest.mark.parametrize(("start", "end"), [(0, 9_000_000), (1, 8_999_999), (4 << 20, 8 << 20), (8_999_000, 9_999_999)])
async def test_a_stream_gives_the_range_in_chunks(store: ArtifactStore, start: int, end: int) -> None:
    data = random.Random(0).randbytes(9_000_000)
    await store.put(VIDEO, data, "video/mp4")
    chunks = [chunk async for chunk in store.stream(VIDEO, start, end, chunk=100_000)]
    assert b"".join(chunks) == data[start:end]
    assert all(0 < len(chunk) <= 100_000 for chunk in chunks)
    assert len(chunks) < 100


async def test_many_streams_at_once_do_not_mix(store: ArtifactStore) -> None:
    files = {f"{JOB}/{i}/video.mp4": random.Random(i).randbytes(300_000) for i in range(20)}
    await asyncio.gather(*(store.put(path, data, "video/mp4") for path, data in files.items()))

    async def streamed(path: str) -> bytes:
        return b"".join([chunk async for chunk in store.stream(path, 0, 300_000, chunk=10_000)])

    assert await asyncio.gather(*(streamed(path) for path in files)) == list(files.values())


async def test_a_reader_of_a_file_that_is_rewritten_gets_a_whole_one(place: Place, store: ArtifactStore) -> None:
    versions = [bytes([i]) * (200_000 + i) for i in range(8)]
    await store.put(VIDEO, versions[0], "image/webp")
    num_read = 0

    async def write(seed: int) -> None:
        draw = random.Random(seed)
        while num_read < 4:
            await store.put(VIDEO, draw.choice(versions), "image/webp")

    async def read() -> None:
        nonlocal num_read
        reader = place.open()
        while num_read < 4:
            assert await reader.read(VIDEO) in versions
            num_read += 1

    await asyncio.wait_for(asyncio.gather(read(), *(write(seed) for seed in range(4))), 60)
    assert await store.read(VIDEO) in versions
    assert place.names() == [VIDEO]


async def test_a_file_that_is_not_there_is_gone(store: ArtifactStore) -> None:
    await store.put(f"{JOB}/1/thumbnail.webp", b"1", "image/webp")
    for path in (VIDEO, f"{JOB}/2/video.mp4", "video_other/1/video.mp4"):
        with pytest.raises(ArtifactGone, match=f"{path}: is not there.* make the video again"):
            await store.read(path)
        with pytest.raises(ArtifactGone):
            await store.read_range(path, 0, 10)
        with pytest.raises(ArtifactGone):
            await anext(store.stream(path, 5, 10))
        assert await store.read_range(path, 5, 5) == b""  # which asks for nothing


async def test_deleting_twice_is_no_error(place: Place, store: ArtifactStore) -> None:
    await store.delete(VIDEO)
    await store.delete_prefix(f"{JOB}/1")
    await store.put(VIDEO, b"1", "video/mp4")
    await store.put(f"{JOB}/1/thumbnail.webp", b"1", "image/webp")
    await store.delete(VIDEO)
    await store.delete(VIDEO)
    assert place.names() == [f"{JOB}/1/thumbnail.webp"]
    await store.delete_prefix(f"{JOB}/1")
    await store.delete_prefix(f"{JOB}/1")
    assert place.names() == []


@pytest.mark.parametrize(
    ("prefix", "left"),
    [
        ("video_a", {"video_ab/1/x", "video_/1/x", "video_a-b/1/x"}),
        ("video_a/", {"video_ab/1/x", "video_/1/x", "video_a-b/1/x"}),
        ("video_a/1", {"video_a/10/x", "video_a/2/x", "video_ab/1/x", "video_/1/x", "video_a-b/1/x"}),
        ("video_a/1/", {"video_a/10/x", "video_a/2/x", "video_ab/1/x", "video_/1/x", "video_a-b/1/x"}),
    ],
)
async def test_removing_a_folder_leaves_its_neighbours(
    place: Place, store: ArtifactStore, prefix: str, left: set[str]
) -> None:
    for path in left | {"video_a/1/x", "video_a/1/y", "video_a/10/x", "video_a/2/x"}:
        await store.put(path, b"1", "video/mp4")
    await store.delete_prefix(prefix)
    assert set(place.names()) == left


async def test_a_folder_of_more_files_than_a_page_is_removed_and_listed(place: Place, store: ArtifactStore) -> None:
    await asyncio.gather(*(store.put(f"{JOB}/{i % 3}/x-{i}", b"", "video/mp4") for i in range(1001)))
    assert await store.prefixes(-60) == [f"{JOB}/0", f"{JOB}/1", f"{JOB}/2"]
    await store.delete_prefix(JOB)
    assert place.names() == []


async def test_prefixes_are_the_folders_whose_newest_file_is_older(place: Place, store: ArtifactStore) -> None:
    a, b, c = (f"video_{letter * 32}" for letter in "abc")
    for path in (f"{a}/1/old", f"{a}/2/old", f"{a}/2/new", f"{b}/0/input", f"{c}/7/new"):
        await store.put(path, b"1", "video/mp4")
    for path in (f"{a}/1/old", f"{a}/2/old", f"{b}/0/input"):
        place.age(path, 1000)
    assert await store.prefixes(900) == [f"{a}/1", f"{b}/0"]
    assert await store.prefixes(1100) == []
    assert await store.prefixes(-60) == [f"{a}/1", f"{a}/2", f"{b}/0", f"{c}/7"]


async def test_folders_of_others_are_never_swept(place: Place, store: ArtifactStore) -> None:
    for path in ("logs/2024/january", "video_a/1/x", f"{JOB}/1/x"):
        await store.put(path, b"1", "video/mp4")
        place.age(path, 1000)
    assert await store.prefixes(900) == [f"{JOB}/1"]


async def test_sweeping_prefixes_leaves_what_is_new(place: Place, store: ArtifactStore) -> None:
    other = f"{JOB[:-1]}e"
    for path in (f"{JOB}/1/x", f"{JOB}/10/x", f"{other}/1/x"):
        await store.put(path, b"1", "video/mp4")
    place.age(f"{JOB}/1/x", 1000)
    for prefix in await store.prefixes(900):
        await store.delete_prefix(prefix)
    assert sorted(place.names()) == sorted([f"{JOB}/10/x", f"{other}/1/x"])


BAD_FILES = [
    "", "/", ".", "..", "video.mp4", f"{JOB}/video.mp4", f"{JOB}/1/", f"{JOB}/1/a/b", f"/{VIDEO}", f"//{VIDEO}",
    f"../{VIDEO}", f"{JOB}/../1/x", f"{JOB}/1/..", f"{JOB}/1/.", f"{JOB}/1/../../../etc/passwd", f"./{VIDEO}",
    f"{JOB}//x", f"{JOB}/1/.video.mp4.part", f"{JOB}/-1/x", f"{JOB}/one/x", f"{JOB}/1/a\\b", f"{JOB}/1/a\0b",
    f"{JOB}/1/a\n", f"{JOB}/1/*", f"{JOB}/1/a b", f"{JOB}/1/é", f"{JOB}/1/%2e%2e", f"{JOB}/١/x",
    f"{JOB}/1/" + "x" * 201, "s3://bucket/1/x", "C:/1/x", "~/1/x",
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_FILES)
async def test_a_path_out_of_the_layout_is_refused(place: Place, store: ArtifactStore, path: str) -> None:
    await store.put(VIDEO, b"1", "video/mp4")
    for call in (
        lambda: store.put(path, b"2", "video/mp4"),
        lambda: store.read(path),
        lambda: store.read_range(path, 0, 1),
        lambda: store.delete(path),
    ):
        with pytest.raises(InvalidRequest, match="must be job/fence/name"):
            await call()
    assert place.names() == [VIDEO]


@pytest.mark.parametrize(
    "prefix",
    ["", "/", ".", "..", "*", f"/{JOB}", f"{JOB}//", f"{JOB}/..", f"{JOB}/*", f"../{JOB}", f"{JOB}/1/..", VIDEO],
)
async def test_a_folder_out_of_the_layout_is_not_removed(place: Place, store: ArtifactStore, prefix: str) -> None:
    await store.put(VIDEO, b"1", "video/mp4")
    with pytest.raises(InvalidRequest, match="must be job/fence/name"):
        await store.delete_prefix(prefix)
    assert place.names() == [VIDEO]


# A folder


async def test_a_relative_url_and_a_file_url_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = ArtifactStore("outputs/store")
    monkeypatch.chdir("/")  # it stays where it was
    await relative.put(VIDEO, b"1", "video/mp4")
    assert await ArtifactStore(f"file://{tmp_path}/outputs/store").read(VIDEO) == b"1"
    await ArtifactStore(f"file://{tmp_path}/with%20space").put(VIDEO, b"1", "video/mp4")
    assert (tmp_path / "with space" / VIDEO).read_bytes() == b"1"


async def test_removing_the_last_folder_of_a_job_leaves_no_empty_one(folder: Place, tmp_path: Path) -> None:
    store = folder.open()
    await store.put(f"{JOB}/1/x", b"1", "video/mp4")
    await store.put(f"{JOB}/2/x", b"1", "video/mp4")
    await store.delete_prefix(f"{JOB}/1")
    assert (tmp_path / "store" / JOB).is_dir()
    await store.delete_prefix(f"{JOB}/2")
    assert list((tmp_path / "store").iterdir()) == []


async def test_strange_things_in_the_folder_are_left_alone(folder: Place, tmp_path: Path) -> None:
    store, root = folder.open(), tmp_path / "store"
    await store.put(VIDEO, b"1", "video/mp4")
    (root / "lost+found" / "1").mkdir(parents=True)
    (root / "notes.txt").write_text("mine")
    (root / JOB / "notes").mkdir()
    (root / JOB / "7").mkdir()  # left by a process that died early
    assert await store.prefixes(-60) == [f"{JOB}/1", f"{JOB}/7"]
    await store.delete_prefix(f"{JOB}/7")
    assert await store.prefixes(-60) == [f"{JOB}/1"]
    assert (root / JOB / "notes").is_dir()


async def test_a_folder_that_cannot_be_looked_into_hides_no_other(
    folder: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, root = folder.open(), tmp_path / "store"
    await store.put(VIDEO, b"1", "video/mp4")
    for name in ("lost+found", f"{JOB[:-1]}0"):
        (root / name).symlink_to(root / name)  # which root may not follow either
    assert await store.prefixes(-60) == [f"{JOB}/1"]
    assert [f"path={JOB[:-1]}0 " in line for line in caplog.messages] == [True]


async def test_a_stream_outlives_the_removal_of_its_file(folder: Place) -> None:
    store = folder.open()
    await store.put(VIDEO, b"0123456789", "video/mp4")
    stream = store.stream(VIDEO, 0, 10, chunk=4)
    assert await anext(stream) == b"0123"
    await store.delete_prefix(JOB)
    assert [chunk async for chunk in stream] == [b"4567", b"89"]


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_streams_that_are_left_early_close_their_files(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = folder.open()
    await store.put(VIDEO, b"0123456789", "video/mp4")
    await store.read(VIDEO)
    chunks, held = store._files.chunks, []

    def held_chunks(*args: Any) -> Any:
        """What nobody holds would close its file by itself."""
        held.append(chunks(*args))
        return held[-1]

    monkeypatch.setattr(store._files, "chunks", held_chunks)
    before = num_open_files()
    for _ in range(50):
        stream = store.stream(VIDEO, 0, 10, chunk=1)
        await anext(stream)
        await stream.aclose()
    assert num_open_files() <= before
    for _ in range(50):
        with pytest.raises(asyncio.CancelledError):
            await cancelled_at_once(store)
    await asyncio.sleep(0.1)
    assert len(held) == 100
    assert num_open_files() <= before + 1


async def cancelled_at_once(store: ArtifactStore) -> None:
    async def read() -> None:
        async for _ in store.stream(VIDEO, 0, 10, chunk=1):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    task.cancel()
    await task


async def test_a_slow_disk_does_not_hold_the_loop(folder: Place, tmp_path: Path) -> None:
    """A named pipe blocks its reader until somebody writes to it."""
    store = folder.open()
    await store.put(f"{JOB}/1/x", b"1", "video/mp4")
    pipe = tmp_path / "store" / VIDEO
    os.mkfifo(pipe)
    reading = asyncio.create_task(store.read(VIDEO))
    streaming = asyncio.create_task(anext(store.stream(f"{JOB}/1/x", 0, 1)))
    assert await asyncio.wait_for(streaming, 5) == b"1"
    assert not reading.done()
    threading.Thread(target=pipe.write_bytes, args=(b"late",)).start()
    assert await asyncio.wait_for(reading, 5) == b"late"


WRITERS = """
import asyncio, os, sys
from serve_app.artifacts import ArtifactStore
async def write(path):
    store = ArtifactStore(sys.argv[1])
    while True:
        for i in range(8):
            await store.put(path, bytes([i]) * 2_000_000, "video/mp4")
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        asyncio.run(write(line.strip()))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    store, chance = ArtifactStore(str(tmp_path)), random.Random(0)
    num_whole = num_parts = 0
    arguments = [sys.executable, "-c", WRITERS, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for fence in range(200):
            if fence >= 10 and num_whole and num_parts:
                break
            path = f"{JOB}/{fence}/video.mp4"
            print(path, file=writers.stdin, flush=True)
            pid = int(writers.stdout.readline())
            time.sleep(chance.uniform(0, 0.2))
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "ended\n"
            num_parts += len(list((tmp_path / JOB).glob(f"{fence}/.*")))
            with suppress(ArtifactGone):
                data = asyncio.run(store.read(path))
                assert data == data[:1] * 2_000_000
                num_whole += 1
        writers.stdin.close()
    assert num_whole, "none was quick enough to write one"
    assert num_parts, "none was killed while it wrote"
    asyncio.run(store.delete_prefix(JOB))
    assert list(tmp_path.iterdir()) == []


async def test_writers_and_removers_of_one_folder_do_not_trip_over_each_other(folder: Place) -> None:
    store, other = folder.open(), folder.open()

    async def write() -> None:
        for i in range(100):
            await store.put(f"{JOB}/1/x-{i % 3}", b"1", "video/mp4")

    async def remove() -> None:
        for _ in range(100):
            await other.delete_prefix(JOB)
            await other.prefixes(-60)

    await asyncio.gather(write(), write(), remove(), remove())
    await store.put(VIDEO, b"1", "video/mp4")
    assert await store.read(VIDEO) == b"1"


ON_A_SMALL_DISK = """
import asyncio, pathlib, sys
from serve_app.artifacts import ArtifactStore
from serve_app.errors import Unavailable
async def main():
    store = ArtifactStore(sys.argv[1])
    await store.put("video_a/1/x", b"x" * 600_000, "video/mp4")
    for path in ("video_a/1/x", "video_a/1/y", "video_a/2/y", "video_b/1/y"):
        try:
            await store.put(path, b"y" * 900_000, "video/mp4")
        except Unavailable as error:
            print(error)
    print([path.name for path in pathlib.Path(sys.argv[1]).rglob("*")])
    print(await store.read("video_a/1/x") == b"x" * 600_000)
    await store.delete("video_a/1/x")
    await store.put("video_a/1/y", b"y" * 900_000, "video/mp4")
asyncio.run(main())
"""


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m disk "$1" && shift && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, str(tmp_path), "true"]).returncode:
        pytest.skip("this system lets nobody mount a disk of their own")
    python = [str(tmp_path), sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)]
    run = subprocess.run([*mount, *python], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *refusals, names, is_whole = run.stdout.splitlines()
    assert len(refusals) == 4
    for refusal in refusals:
        assert re.fullmatch(r"video_.*: .* has no room for its 900000 bytes; free some of its disk", refusal)
    assert (names, is_whole) == ("['video_a', '1', 'x']", "True")


async def test_a_file_that_may_not_be_so_large_is_not_left_half(folder: Place, tmp_path: Path) -> None:
    """The system's own limit, for those who cannot mount a small disk."""
    store = folder.open()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(Unavailable, match="no room for its 900000 bytes"):
            await store.put(VIDEO, b"y" * 900_000, "video/mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "store").rglob("*")) == []


async def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = ArtifactStore(str(tmp_path / "file"))
    with pytest.raises(Unavailable, match=r"Not a directory.*storage\.artifacts"):
        await store.put(VIDEO, b"1", "video/mp4")
    with pytest.raises(Unavailable, match="Not a directory"):
        await store.read(VIDEO)
    with pytest.raises(Unavailable, match="Not a directory"):
        await store.prefixes(0)
    assert (tmp_path / "file").read_text() == "in the way"


# S3


async def test_s3_takes_address_and_credentials_from_the_environment(
    bucket: Place, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bucket.open().put(VIDEO, b"1", "video/mp4")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    assert await ArtifactStore(f"{bucket.url}/").read(VIDEO) == b"1"
    assert await ArtifactStore(bucket.url.removesuffix("/videos")).prefixes(-60) == []
    at_the_top = ArtifactStore(bucket.url.removesuffix("/some/videos"))
    await at_the_top.put(VIDEO, b"2", "video/mp4")
    assert await at_the_top.prefixes(-60) == [f"{JOB}/1"]
    await at_the_top.delete_prefix(JOB)
    assert bucket.names() == [VIDEO]


async def test_a_bucket_that_does_not_exist_is_unavailable_and_not_empty(s3_url: str) -> None:
    await says_of_every_call(
        ArtifactStore("s3://no-such-bucket/videos", {"endpoint_url": s3_url, **KEYS}),
        r"its bucket does not exist; make it, or correct storage\.artifacts",
    )


async def test_an_endpoint_that_is_not_there_is_unavailable() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        store = ArtifactStore("s3://bucket/videos", {"endpoint_url": url, **KEYS})
        await says_of_every_call(store, r"EndpointConnectionError; see to its address", within_s=20)


async def test_an_endpoint_that_never_answers_does_not_hold_the_loop_and_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(100)
        options = {
            "endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "config_kwargs": {"read_timeout": 0.2, "retries": {"max_attempts": 0}},
            **KEYS,
        }
        store = ArtifactStore("s3://bucket/videos", options)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(store.read(VIDEO), 0.2)
        with pytest.raises(Unavailable, match="ReadTimeoutError"):
            await asyncio.wait_for(store.read(VIDEO), 8)  # 25 tries would take 15 s


async def says_of_every_call(store: ArtifactStore, message: str, within_s: float = 5) -> None:
    calls = {
        "put": store.put(VIDEO, b"1", "video/mp4"),
        "read": store.read(VIDEO),
        "read_range": store.read_range(VIDEO, 0, 5),
        "stream": anext(store.stream(VIDEO, 0, 5)),
        "delete": store.delete(VIDEO),
        "delete_prefix": store.delete_prefix(JOB),
        "prefixes": store.prefixes(0),
    }
    ends = await asyncio.wait_for(asyncio.gather(*calls.values(), return_exceptions=True), within_s)
    for name, end in zip(calls, ends, strict=True):
        assert isinstance(end, Unavailable), f"{name}: {end!r}"
        with pytest.raises(Unavailable, match=message):
            raise end


# Addresses


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("", {}, "must name a folder"),
        ("file://", {}, "must name a folder"),
        ("outputs", {"endpoint_url": "http://x"}, "takes no options"),
        ("s3://", KEYS, "must name a bucket, as in s3://bucket/videos"),
        ("s3:///videos", KEYS, "must name a bucket"),
        ("nosuch://bucket", {}, r"storage\.artifacts nosuch://: cannot be used"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_at_once(url: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ArtifactStore(url, options)
