"""Where the files of jobs are kept: a folder, or an object store such as S3. The layout is "{job}/{fence}/{name}"."""

import hashlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar, TypeVarTuple
from urllib.parse import unquote

import anyio
import fsspec
from anyio import to_thread

from serve_app.bucket import Bucket
from serve_app.errors import ArtifactGone
from serve_app.folder import Folder
from serve_app.jobs.model import Artifact
from t2v_core.errors import InvalidRequest

# No name begins with a dot: that rules out ".." and the temporary names of a folder.
_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}"
_FENCE = r"[0-9]{1,18}"
_OURS = re.compile(rf"video_[0-9a-f]{{32}}/{_FENCE}")  # a bucket may hold other people's folders as well
_FILE = re.compile(rf"{_NAME}/{_FENCE}/{_NAME}")
_JOB_OR_FOLDER = re.compile(rf"{_NAME}(/{_FENCE})?")

_NUM_THREADS = 16  # apart from those of the web framework, which must not wait for a slow store
# As it comes, s3fs asks a store that does not answer for half an hour. These are 3 tries of 15 s, 3 s to connect.
_S3_PATIENCE = {"connect_timeout": 3, "read_timeout": 15, "retries": {"mode": "standard", "max_attempts": 2}}

_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class ArtifactStore:
    """Files by path. What is read is always a whole file as it was put, whoever writes meanwhile.

    url: a folder, "file:///folder", or "s3://bucket/prefix" and what else fsspec knows of object stores.
    options: of fsspec's filesystem, such as `endpoint_url`; what is not there, s3fs takes from AWS's own variables.

    Raises InvalidRequest for paths of another layout, ArtifactGone, and Unavailable where the store does not work.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:  # fsspec's are of any type
        self._files = _open(url, dict(options or {}))
        self._threads = anyio.CapacityLimiter(_NUM_THREADS)

    async def put(self, path: str, data: bytes, media_type: str) -> Artifact:
        """Write a file, in place of the one that is there. It is there for all, and to stay, or this raises."""
        _check(path, _FILE)
        etag = await self._in_thread(_write, self._files, path, data)
        return Artifact(path, media_type, len(data), etag)

    async def read(self, path: str) -> bytes:
        """The whole file."""
        _check(path, _FILE)
        try:
            return await self._in_thread(self._files.read, path)
        except FileNotFoundError as error:
            raise _gone(path) from error

    async def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes from `start` up to and without `end`; fewer where the file ends before."""
        async with aclosing(self.stream(path, start, end)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def stream(self, path: str, start: int, end: int, chunk: int = 1 << 18) -> AsyncGenerator[bytes, None]:
        """The same in chunks, none empty. A folder gives all of a file that is removed meanwhile."""
        _check(path, _FILE)
        if not 0 <= start <= end or chunk < 1:
            raise InvalidRequest(f"bytes {start} to {end}: must be 0 <= start <= end, in chunks of at least 1")
        if start == end:
            return
        chunks = self._files.chunks(path, start, end, chunk)
        try:
            while data := await self._in_thread(next, chunks, b""):
                yield data
        except FileNotFoundError as error:
            raise _gone(path) from error
        finally:
            with suppress(ValueError):  # after a cancel a thread may still read: then the file closes behind it
                chunks.close()

    async def delete(self, path: str) -> None:
        """Remove a file. One that is not there is no error."""
        _check(path, _FILE)
        with suppress(FileNotFoundError):
            await self._in_thread(self._files.delete, path)

    async def delete_prefix(self, prefix: str) -> None:
        """Remove the folder "{job}" or "{job}/{fence}" with all that is in it. One that is not there is no error."""
        folder = prefix.removesuffix("/")
        _check(folder, _JOB_OR_FOLDER)
        with suppress(FileNotFoundError):
            await self._in_thread(self._files.delete_folder, folder)

    async def prefixes(self, older_than_s: float) -> list[str]:
        """The folders "{job}/{fence}" whose newest file is older than this, sorted."""
        limit = time.time() - older_than_s
        try:
            newest = await self._in_thread(self._files.newest)
        except FileNotFoundError:  # nothing was ever put
            return []
        return sorted(folder for folder, at in newest.items() if at < limit and _OURS.fullmatch(folder))

    async def _in_thread(self, function: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        return await to_thread.run_sync(function, *arguments, limiter=self._threads, abandon_on_cancel=True)


class _Files(Protocol):
    """What a kind of store can do. The calls block; paths have been checked."""

    def write(self, path: str, data: bytes) -> None: ...

    def read(self, path: str) -> bytes: ...

    def chunks(self, path: str, start: int, end: int, chunk: int) -> Generator[bytes, None, None]: ...

    def delete(self, path: str) -> None: ...

    def delete_folder(self, folder: str) -> None: ...

    def newest(self) -> dict[str, float]: ...


def _open(url: str, options: dict[str, Any]) -> _Files:
    protocol, separator, rest = url.partition("://")
    if not separator or protocol == "file":
        folder = unquote(rest) if separator else url
        if not folder or options:
            raise InvalidRequest(f"storage.artifacts {url!r}: must name a folder, which takes no options")
        return Folder(Path(folder).absolute())
    usual: dict[str, Any] = {"use_listings_cache": False}  # which would hide what other processes write
    if protocol == "s3":
        usual["config_kwargs"] = _S3_PATIENCE
    try:
        filesystem, root = fsspec.url_to_fs(url, **{**usual, **options})
    except (ImportError, ValueError, TypeError) as error:
        raise InvalidRequest(
            f"storage.artifacts {protocol}://: cannot be used ({error}); s3:// needs `pip install 't2v-serve[s3]'`"
        ) from error
    filesystem.retries = 1  # of s3fs, around those of its client
    if not rest.partition("/")[0]:
        raise InvalidRequest(f"storage.artifacts {url!r}: must name a bucket, as in {protocol}://bucket/videos")
    return Bucket(filesystem, root.rstrip("/"))


def _check(path: str, layout: re.Pattern[str]) -> None:
    if layout.fullmatch(path) is None:
        raise InvalidRequest(
            f"path {path!r:.200}: must be job/fence/name, or a folder of these where one is removed; "
            "a name is of letters, digits, '-', '_' and '.', and begins with no dot"
        )


def _write(files: _Files, path: str, data: bytes) -> str:
    files.write(path, data)
    return hashlib.sha256(data).hexdigest()


def _gone(path: str) -> ArtifactGone:
    return ArtifactGone(f"file {path}: is not there, as it has expired or was removed; make the video again")
