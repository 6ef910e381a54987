"""The files of jobs, in a folder or in S3, by fsspec: whole or not there."""

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from serve_app.errors import ArtifactGone, Unavailable
from serve_app.jobs.model import Artifact
from t2v_core.errors import InvalidRequest

_CHUNK_BYTES = 1 << 18
_Result = TypeVar("_Result")


class ArtifactStore:
    """Files by paths like "{job}/{fence}/video.mp4". Nothing that is half-written can be read.

    url: a folder, or what fsspec knows, such as "s3://bucket/prefix"; `options` go to its file system.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        # Other processes write too: what a folder held a second ago says nothing.
        protocol, _, _ = url.partition("://") if "://" in url else ("file", "", "")
        extra = {} if protocol == "file" else {"use_listings_cache": False}
        try:
            self._files, self._root = fsspec.core.url_to_fs(url, **{**extra, **(options or {})})
        except (ValueError, ImportError) as error:
            raise InvalidRequest(
                f"artifacts {url}: {error}; use a folder or s3://bucket/prefix", param="artifacts"
            ) from error
        self._is_local = isinstance(self._files, LocalFileSystem)

    async def put(self, path: str, data: bytes, media_type: str) -> Artifact:
        """Write a file, whole or not at all. Raises Unavailable."""
        full = self._full(path)
        await self._in_thread(path, lambda: self._write(full, data))
        return Artifact(path, media_type, len(data), hashlib.sha256(data).hexdigest())

    async def read(self, path: str) -> bytes:
        """The whole file. Raises ArtifactGone, Unavailable."""
        full = self._full(path)
        data: bytes = await self._in_thread(path, lambda: self._files.cat_file(full))
        return data

    async def read_range(self, path: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to, not including, `end`."""
        full = self._full(path)
        data: bytes = await self._in_thread(path, lambda: self._files.cat_file(full, start=start, end=end))
        return data

    async def stream(self, path: str, start: int, end: int, chunk: int = _CHUNK_BYTES) -> AsyncIterator[bytes]:
        """The same, in chunks."""
        for begin in range(start, end, chunk):
            yield await self.read_range(path, begin, min(begin + chunk, end))

    async def delete(self, path: str) -> None:
        """Remove a file. One that is not there is no error."""
        full = self._full(path)
        with contextlib.suppress(ArtifactGone):
            await self._in_thread(path, lambda: self._files.rm_file(full))

    async def delete_prefix(self, prefix: str) -> None:
        """Remove a folder, as "{job}/" or "{job}/{fence}/", with all that is in it."""
        full = self._full(prefix.rstrip("/"))
        with contextlib.suppress(ArtifactGone):
            await self._in_thread(prefix, lambda: self._files.rm(full, recursive=True))

    async def prefixes(self, older_than_s: float) -> list[str]:
        """The folders "{job}/{fence}" of which every file is older, by the store's own times."""
        newest = await self._in_thread("", self._newest)
        limit = time.time() - older_than_s
        return sorted(prefix for prefix, changed in newest.items() if changed < limit)

    def _newest(self) -> dict[str, float]:
        newest: dict[str, float] = {}
        for full, info in self._files.find(self._root, detail=True).items():
            job, _, rest = full.removeprefix(self._root).strip("/").partition("/")
            fence, separator, _ = rest.partition("/")
            if separator:
                changed = info["mtime"] if "mtime" in info else info["LastModified"].timestamp()
                newest[f"{job}/{fence}"] = max(newest.get(f"{job}/{fence}", 0.0), changed)
        return newest

    def _write(self, full: str, data: bytes) -> None:
        if not self._is_local:
            self._files.pipe_file(full, data)  # a PUT is atomic
            return
        path = Path(full)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            with unfinished.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _full(self, path: str) -> str:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
            raise InvalidRequest(
                f"path {path!r:.100}: must lie inside the store; name a file under its job", param="path"
            )
        return f"{self._root.rstrip('/')}/{'/'.join(parts)}"

    async def _in_thread(self, path: str, action: Callable[[], _Result]) -> _Result:
        def run() -> _Result:
            with _explained(path):
                return action()

        return await asyncio.to_thread(run)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactGone(f"{path}: is not there; it has expired or was removed") from error
    except Exception as error:  # each file system has errors of its own
        raise Unavailable(f"{path}: the artifact store cannot be used ({error}): try again later") from error
