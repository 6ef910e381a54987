"""Checkpoints of the Hugging Face hub: fetches the files that the loader chooses, and no others."""

import glob
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from t2v_core.errors import CheckpointError, CheckpointNotFound

logger = logging.getLogger(__name__)

T = TypeVar("T")
Select = Callable[[Sequence[str]], Sequence[str]]

# Between attempts, where the library gives up at the first failure.
_PAUSES_S = (0.5, 2.0)


class _HubUnreachable(CheckpointNotFound):
    """The hub said neither yes nor no."""


def download(repo_id: str, *, revision: str | None = None, select: Select) -> Path:
    """Return the local folder that holds, whole, those files of a hub repository that `select` chose.

    `revision` is a branch, a tag or a commit, by default the main branch; it is resolved to a commit once.
    `select` gets all file names of that commit and returns those to fetch, or raises a CheckpointError where they are
    not enough.
    Offline (HF_HUB_OFFLINE=1), or when the hub gives no answer, a cached snapshot serves that is complete or from
    whose files alone `select` can choose.

    Raises CheckpointNotFound where repository, revision or hub are out of reach and the cache is no help,
    CheckpointError where a transfer keeps failing, a file is damaged or the disk takes no more.
    """
    revision = revision or constants.DEFAULT_REVISION
    try:
        commit, sizes = _attempt(partial(_list_files, repo_id, revision), repo_id, revision)
    except _HubUnreachable as error:
        try:
            folder = _find_in_cache(repo_id, revision, select)
        except CheckpointError as not_cached:
            raise CheckpointNotFound(f"{error}. The cache cannot serve: {not_cached}") from error
        if not constants.is_offline_mode():
            logger.warning("hub unreachable, cached checkpoint used: folder=%s reason=%s", folder, error)
        return folder
    names = select(list(sizes))
    patterns = [glob.escape(name) for name in names]
    fetch = partial(snapshot_download, repo_id, revision=commit, allow_patterns=patterns)
    folder = Path(_attempt(fetch, repo_id, revision))
    if lacking := _lacking(folder, names, sizes):
        raise CheckpointError(
            f"{folder} does not hold {', '.join(lacking)} whole; fetch again with "
            f"`hf download {repo_id} {' '.join(lacking)} --revision {commit} --force-download`"
        )
    _remember(folder, revision)
    return folder


def _list_files(repo_id: str, revision: str) -> tuple[str, dict[str, int | None]]:
    """The commit that `revision` means now, and the size in bytes of each of its files."""
    timeout_s = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout_s)
    if info.sha is None or info.siblings is None:
        raise ValueError("the answer names no commit or no files")
    return info.sha, {file.rfilename: file.size for file in info.siblings}


def _find_in_cache(repo_id: str, revision: str, select: Select) -> Path:
    try:
        # Without patterns to satisfy, the library only looks up the folder that the revision means.
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise CheckpointNotFound(f"{constants.HF_HUB_CACHE} does not hold it") from error
    sizes: dict[str, int | None]
    try:
        sizes = {file.path: file.size for file in get_cached_repo_tree(repo_id, revision=folder.name)}
    except CachedRepoTreeNotFoundError:  # fetched by a release of the library that kept no listing
        sizes = {path.relative_to(folder).as_posix(): None for path in folder.rglob("*") if path.is_file()}
    names = select(list(sizes))
    if lacking := _lacking(folder, names, sizes):
        held = [name for name in sizes if (folder / name).is_file()]
        if not _serves(folder, held, sizes, select):
            raise CheckpointNotFound(f"{folder} lacks {', '.join(lacking)}")
    return folder


def _serves(folder: Path, held: Sequence[str], sizes: Mapping[str, int | None], select: Select) -> bool:
    """Whether what the folder holds is enough by itself, as files of another precision can be."""
    try:
        return not _lacking(folder, select(held), sizes)
    except CheckpointError:
        return False


def _lacking(folder: Path, names: Sequence[str], sizes: Mapping[str, int | None]) -> list[str]:
    """Those of `names` that are not in `folder`, or not at the size that the hub gives."""
    return [
        name
        for name in names
        if not (folder / name).is_file() or sizes.get(name) not in (None, (folder / name).stat().st_size)
    ]


def _remember(folder: Path, revision: str) -> None:
    """Note what the revision means, so that a start without the hub finds the last whole snapshot of it.

    Each part of a service fetches what it needs: until a snapshot has all that the one before has, that one serves.
    """
    if revision == folder.name:
        return
    ref = folder.parent.parent / "refs" / revision
    fresh = ref.with_name(f"{ref.name}.{uuid.uuid4().hex}")
    with suppress(OSError):  # a cache that cannot be written serves all the same
        known = ref.read_text().strip() if ref.is_file() else ""
        if known and not _files(folder.parent / known) <= _files(folder):
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(folder.name)
        fresh.replace(ref)


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _attempt(call: Callable[[], T], repo_id: str, revision: str) -> T:
    """What `call` returns. A failure that may pass is tried again; others are raised as CheckpointErrors."""
    pauses_s = iter(_PAUSES_S)
    while True:
        try:
            return call()
        # RuntimeError is how hf_xet, the library's engine for large files, reports a failure.
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError) as error:
            pause_s = next(pauses_s, None) if _may_pass(error) else None
            if pause_s is None:
                raise _explain(error, repo_id, revision) from error
            logger.warning("hub transfer failed, trying again: pause_s=%s error=%r", pause_s, error)
            time.sleep(pause_s)


def _may_pass(error: Exception) -> bool:
    # The subclasses of this class are answers that stand. A bare 403 is how a signed link to a CDN expires.
    if type(error) is HfHubHTTPError:
        return error.response.status_code >= 500 or error.response.status_code == 403
    # A file of the wrong size is the only bare OSError of the library; one of the system has a number.
    is_wrong_size = type(error) is OSError and error.errno is None
    return is_wrong_size or isinstance(error, httpx2.ReadError | httpx2.RemoteProtocolError)


def _explain(error: Exception, repo_id: str, revision: str) -> CheckpointError:
    what = f"{repo_id} (revision {revision})"
    hub = constants.ENDPOINT
    cause = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    bring_it = f"fill the cache with `hf download {repo_id} --revision {revision}`, or give a folder"
    match error:
        case HFValidationError():
            return CheckpointNotFound(f"{repo_id!r} is no hub id; give demo, a folder, or an id like owner/name")
        case GatedRepoError():
            return CheckpointNotFound(
                f"{what}: its owner grants access on request; ask at {hub}/{repo_id} and run `hf auth login`"
            )
        case RevisionNotFoundError():
            return CheckpointNotFound(f"{what}: no such branch, tag or commit; see {hub}/{repo_id}/commits")
        case HfHubHTTPError() if status in (401, 403, 404):
            return CheckpointNotFound(
                f"{what}: not on {hub}, or private; check the name, or run `hf auth login` ({cause})"
            )
        case HfHubHTTPError() if status < 500 and status != 429:
            return CheckpointError(f"{what}: {hub} refused ({cause}); see {hub}/{repo_id}")
        case OfflineModeIsEnabled():
            return _HubUnreachable(f"{what}: offline mode is on; unset HF_HUB_OFFLINE, or {bring_it}")
        case LocalEntryNotFoundError() | ValueError() | httpx2.HTTPError() | httpx2.InvalidURL():
            return _HubUnreachable(f"{what}: no usable answer from {hub} ({cause}); connect, or {bring_it}")
        case OSError(errno=int()):
            return CheckpointError(
                f"{what}: cannot write to {constants.HF_HUB_CACHE} ({error.strerror}); "
                "free space or permit it there, or set HF_HOME to another disk"
            )
    return CheckpointError(f"{what}: the transfer failed ({cause}); start again, finished files are kept")
