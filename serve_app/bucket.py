"""Files of jobs in an object store, such as S3. An object appears when it is whole; nothing is ever renamed."""

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from fsspec import AbstractFileSystem

from serve_app.errors import Unavailable

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 4 << 20  # of one request: one for every chunk would take a round trip each


class Bucket:
    """The calls block, and raise FileNotFoundError, and Unavailable where the store does not work."""

    def __init__(self, filesystem: AbstractFileSystem, root: str) -> None:
        self._filesystem = filesystem
        self._root = root

    def write(self, path: str, data: bytes) -> None:
        with self._explained(path):
            self._filesystem.pipe_file(f"{self._root}/{path}", data)

    def read(self, path: str) -> bytes:
        return self._get(path, 0, None)

    def chunks(self, path: str, start: int, end: int, chunk: int) -> Generator[bytes, None, None]:
        for first in range(start, end, _BLOCK_BYTES):
            asked = min(_BLOCK_BYTES, end - first)
            block = self._get(path, first, first + asked)
            for offset in range(0, len(block), chunk):
                yield block[offset : offset + chunk]
            if len(block) < asked:
                return

    def delete(self, path: str) -> None:
        with self._explained(path):
            self._filesystem.rm_file(f"{self._root}/{path}")

    def delete_folder(self, folder: str) -> None:
        with self._explained(folder):
            self._filesystem.rm(f"{self._root}/{folder}", recursive=True)

    def newest(self) -> dict[str, float]:
        """When the newest file of each folder "{job}/{fence}" was written, in unix seconds."""
        newest: dict[str, float] = {}
        # One flat listing, 1000 files a request: asking folder by folder would take one for each job that is kept.
        with self._explained("listing"):
            for path, info in self._filesystem.find(self._root, detail=True).items():
                folder, _, _ = path.removeprefix(f"{self._root}/").rpartition("/")
                written_at = info.get("LastModified") or self._filesystem.modified(path)
                newest[folder] = max(newest.get(folder, 0.0), written_at.timestamp())
        return newest

    def _get(self, path: str, start: int, end: int | None) -> bytes:
        with self._explained(path):
            try:
                # With a start it is one GET. Without one, s3fs asks for the size first.
                data: bytes = self._filesystem.cat_file(f"{self._root}/{path}", start=start, end=end)
            except OSError as error:
                if _s3_code(error) == "InvalidRange":  # it ends before `start`
                    return b""
                raise
            return data

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if _s3_code(error) == "NoSuchBucket":
                raise self._unavailable(path, error, "its bucket does not exist; make it") from error
            raise
        except Exception as error:  # each store raises errors of its own libraries
            reason = f"{type(error).__name__}; see to its address and credentials"
            raise self._unavailable(path, error, reason) from error

    def _unavailable(self, path: str, error: Exception, reason: str) -> Unavailable:
        # Who reads the message may be a caller from outside: where the store is, only the log says.
        logger.warning("artifact store fails: root=%s path=%s error=%r", self._root, path, error)
        return Unavailable(f"{path}: the artifact store fails: {reason}, or correct storage.artifacts")


def _s3_code(error: BaseException) -> str | None:
    """What S3 itself called the error that s3fs has translated."""
    response = getattr(error.__cause__, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code
