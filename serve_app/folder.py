"""Files of jobs in a folder, which several processes may share. A file appears under its name when it is whole."""

import errno
import logging
import os
import secrets
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serve_app.errors import Unavailable

logger = logging.getLogger(__name__)

_JOBS = "video_"  # what else there is, such as a volume's lost+found, is not for us to look into
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NUM_TRIES = 100  # one does, unless somebody removes folders all the time


class Folder:
    """The calls block, and raise FileNotFoundError, and Unavailable where the disk does not work."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, path: str, data: bytes) -> None:
        """When this returns, a loss of power leaves the file there. When it raises, all is as it was."""
        target = self._root / path
        for _ in range(_NUM_TRIES):
            try:
                with self._explained(path, num_bytes=len(data)):
                    _make_folder(target.parent)
                    _write_whole(target, data)
                return
            except FileNotFoundError:
                continue  # another process has just removed the folder, as it was empty or expired
            except Unavailable:
                for folder in (target.parent, target.parent.parent):
                    with suppress(OSError):  # which says that others use it
                        folder.rmdir()
                raise
        raise Unavailable(f"{path}: its folder is removed as fast as it is made; give each service its own store")

    def read(self, path: str) -> bytes:
        with self._explained(path):
            return (self._root / path).read_bytes()

    def chunks(self, path: str, start: int, end: int, chunk: int) -> Generator[bytes, None, None]:
        with self._explained(path), (self._root / path).open("rb") as file:
            file.seek(start)
            while start < end and (data := file.read(min(chunk, end - start))):
                start += len(data)
                yield data

    def delete(self, path: str) -> None:
        with self._explained(path):
            (self._root / path).unlink()

    def delete_folder(self, folder: str) -> None:
        target = self._root / folder
        with self._explained(folder):
            _remove_tree(target)
            if target.parent != self._root:
                _remove_if_empty(target.parent)

    def newest(self) -> dict[str, float]:
        """When the newest file of each folder "{job}/{fence}" was written, in unix seconds.

        A job's folder that cannot be looked into is logged, and left out.
        """
        newest = {}
        with self._explained("listing"):
            jobs = [entry for entry in self._root.iterdir() if entry.name.startswith(_JOBS)]
        for job in jobs:
            # Removed meanwhile, or no folder at all.
            with suppress(Unavailable), self._explained(job.name), suppress(FileNotFoundError, NotADirectoryError):
                for folder in job.iterdir():
                    if folder.is_dir():
                        newest[f"{job.name}/{folder.name}"] = _newest_mtime(folder)
        return newest

    @contextmanager
    def _explained(self, path: str, num_bytes: int = 0) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            logger.warning("artifact folder fails: folder=%s path=%s error=%s", self._root, path, error)
            if error.errno in _FULL:
                raise Unavailable(
                    f"{path}: the artifact store has no room for its {num_bytes} bytes; free some of its disk"
                ) from error
            reason = error.strerror or type(error).__name__
            raise Unavailable(
                f"{path}: the artifact store fails ({reason}); see to the folder of storage.artifacts"
            ) from error


def _write_whole(target: Path, data: bytes) -> None:
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
        _sync_folder(target.parent)
    finally:
        with suppress(OSError):
            part.unlink()


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_tree(folder: Path) -> None:
    """Like shutil.rmtree, but others may remove from it, and add to it, at the same time."""
    for entry in list(folder.iterdir()):
        # Removed meanwhile, or even made again, as a folder: then somebody uses it.
        with suppress(FileNotFoundError, IsADirectoryError):
            if entry.is_dir() and not entry.is_symlink():
                _remove_tree(entry)
            else:
                entry.unlink()
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def _newest_mtime(folder: Path) -> float:
    """Of an empty folder, its own."""
    mtimes = []
    for entry in folder.iterdir():
        with suppress(FileNotFoundError):
            mtimes.append(entry.stat().st_mtime)
    return max(mtimes, default=folder.stat().st_mtime)
