"""API keys: who a request is from. Without any configured, everybody is the one owner "local"."""

import hashlib
import hmac
import threading
from pathlib import Path

from serve_app.errors import Unauthorized
from t2v_core.errors import InvalidRequest

NO_KEYS_OWNER = "local"
MIN_KEY_CHARACTERS = 16
_REMEDY = 'send "Authorization: Bearer KEY"'


class ApiKeys:
    """Keys by their sha256, and whose they are. A file of keys is read again when it changes."""

    def __init__(self, digests: dict[str, bytes], file: Path | None = None) -> None:
        self._digests, self._file = digests, file
        self._lock = threading.Lock()
        self._read_at: tuple[int, int] | None = None  # of the file: when it was changed, and its size

    @classmethod
    def parse(cls, lines: str) -> "ApiKeys":
        """Keys from lines of "name:key", without empty lines and those that begin with #. Raises InvalidRequest."""
        return cls(_digests(lines))

    @classmethod
    def configured(cls, file: Path | None, keys: str | None) -> "ApiKeys":
        """Keys from a file, from text, or from both. Raises InvalidRequest for a file that cannot be read."""
        store = cls(_digests(keys or ""), file)
        if file is not None:
            try:
                store._refresh(file)
            except OSError as error:
                raise InvalidRequest(
                    f"keys file {file}: cannot be read ({error.strerror}); create it", param="keys"
                ) from error
        return store

    def owner_of(self, authorization: str | None) -> str:
        """Whose key the Authorization header carries. Raises Unauthorized."""
        if self._file is not None:
            with self._lock:
                self._refresh_if_possible(self._file)
        if not self._digests and self._file is None:
            return NO_KEYS_OWNER
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized(f"no API key: {_REMEDY}")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, so that the time taken says nothing about any.
        owners = [name for name, known in self._digests.items() if hmac.compare_digest(known, digest)]
        if not owners:
            raise Unauthorized(f"this API key is not known: {_REMEDY}, with one that is")
        return owners[0]

    def _refresh_if_possible(self, file: Path) -> None:
        """A file that is being replaced, or is wrong for a moment, leaves the keys as they were."""
        try:
            self._refresh(file)
        except (OSError, InvalidRequest):
            return

    def _refresh(self, file: Path) -> None:
        status = file.stat()
        changed = (status.st_mtime_ns, status.st_size)
        if changed != self._read_at:
            self._digests = _digests(file.read_text(encoding="utf-8"))
            self._read_at = changed


def _digests(lines: str) -> dict[str, bytes]:
    digests: dict[str, bytes] = {}
    for number, line in enumerate(lines.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, separator, key = (part.strip() for part in line.partition(":"))
        if not separator or not name:
            raise InvalidRequest(f'keys, line {number}: must be "name:key"', param="keys")
        if len(key) < MIN_KEY_CHARACTERS:
            raise InvalidRequest(
                f"keys, line {number}: the key of {name} has {len(key)} characters, must have at least "
                f"{MIN_KEY_CHARACTERS}; make one with: openssl rand -hex 24",
                param="keys",
            )
        digest = hashlib.sha256(key.encode()).digest()
        if name in digests or digest in digests.values():
            raise InvalidRequest(f"keys, line {number}: {name} or its key is there twice; remove one", param="keys")
        digests[name] = digest
    return digests
