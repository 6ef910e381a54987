"""Who calls: API keys, and the owner that each stands for."""

import hashlib
import hmac
import logging
import re
from pathlib import Path

from serve_app.errors import Unauthorized
from t2v_core.errors import InvalidRequest

logger = logging.getLogger(__name__)

_LOCAL = "local"  # the owner of everything where no keys are configured
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_KEY = re.compile(r"[!-~]{16,512}")  # what can stand in a header as it is
_SCHEME = "bearer "

_State = tuple[int, int, int, int]
_MISSING: _State = (0, 0, 0, 0)


class ApiKeys:
    """The keys that are known, by the names of their owners. No message and no log line holds a key, or part of one."""

    def __init__(self, keys: dict[str, bytes], file: "_KeysFile | None" = None) -> None:
        self._digests = keys
        self._file = file

    @classmethod
    def parse(cls, text: str) -> "ApiKeys":
        """Keys from lines "name:key". Empty lines and lines that begin with "#" do not count. None: all may call.

        Raises InvalidRequest, as all of these do.
        """
        return cls(_parse(text, "keys"))

    @classmethod
    def configured(cls, file: Path | None, keys: str | None) -> "ApiKeys":
        """Keys of a file, which is read again whenever it changes, and of a text. Neither: all may call.

        One that is given but empty is refused: a secret that was mounted wrongly must not open the service.
        """
        known = _parse(keys, "keys.keys", may_be_empty=False) if keys is not None else {}
        if file is None:
            return cls(known)
        return cls(known, _KeysFile(file, known))

    @property
    def are_needed(self) -> bool:
        """Whether a call needs one. A file is never without any."""
        return bool(self._digests) or self._file is not None

    def owner_of(self, authorization_header: str | None) -> str:
        """Whose key the header carries; "local" where there are no keys. Raises Unauthorized."""
        digests = self._file.digests() if self._file is not None else self._digests
        if not digests:
            return _LOCAL
        if not authorization_header:
            raise Unauthorized('no API key: send it in the header "Authorization: Bearer KEY"')
        if authorization_header[: len(_SCHEME)].lower() != _SCHEME:  # in any case: RFC 9110, section 11.1
            raise Unauthorized('the header Authorization: must be "Bearer KEY", with one space')
        digest = _digest(authorization_header[len(_SCHEME) :])
        owner = None
        for name, known in digests.items():  # all of them, so that the time does not tell which one it was
            if hmac.compare_digest(digest, known):
                owner = name
        if owner is None:
            raise Unauthorized("the API key is not known: check that it is whole, or ask the operator for one")
        return owner


class _KeysFile:
    """Keys in a file, as it is now. While it cannot be used, those that it held before count."""

    def __init__(self, path: Path, others: dict[str, bytes]) -> None:
        self._path = path
        self._others = others
        self._state, self._digests = self._read()
        self._told: _State | None = None  # of what the log tells last

    def digests(self) -> dict[str, bytes]:
        """The keys of the file and the others."""
        state = _state(self._path)
        if state != self._state:
            try:
                self._state, self._digests = self._read()
                logger.info("keys read: file=%s num_keys=%d", self._path, len(self._digests))
            except InvalidRequest as error:
                if state != self._told:  # it is asked for every request
                    logger.error("keys not read, the old ones hold: file=%s error=%s", self._path, error)
            self._told = state
        return self._digests

    def _read(self) -> tuple[_State, dict[str, bytes]]:
        state = _state(self._path)  # before the text: a write in between is then seen by the next look
        try:
            text = self._path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise InvalidRequest(
                f"keys.file {self._path}: cannot be read ({reason}); give a file of lines name:key"
            ) from None  # the error of a decoder holds what it could not decode
        return state, _parse(text, f"keys.file {self._path}", may_be_empty=False, others=self._others)


def _state(path: Path) -> _State:
    """What differs when a file was written or replaced; nothing of one that is not there."""
    try:
        stat = path.stat()
    except OSError:
        return _MISSING
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino


def _parse(
    text: str, source: str, *, may_be_empty: bool = True, others: dict[str, bytes] | None = None
) -> dict[str, bytes]:
    """The digests by name, `others` among them. Messages count lines: what stands in one may be a key."""
    known = dict(others or {})
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{source}, line {number}"
        name, separator, key = (part.strip() for part in line.partition(":"))
        if not separator:
            raise InvalidRequest(f"{where}: has no colon; write name:key")
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"{where}: a name is of 1-64 letters, digits, '.', '_', '@' and '-'; write name:key")
        if not _KEY.fullmatch(key):
            raise InvalidRequest(
                f"{where}: a key is of 16-512 visible ASCII characters, this one has {len(key)}; "
                "make one with `openssl rand -hex 32`"
            )
        if name in known:
            raise InvalidRequest(f"{where}: this name was given before; give every key a name of its own")
        digest = _digest(key)
        if digest in known.values():
            raise InvalidRequest(f"{where}: this key was given before; give every name a key of its own")
        known[name] = digest
    if not may_be_empty and len(known) == len(others or {}):
        raise InvalidRequest(f"{source}: holds no keys; write lines name:key, or leave the setting out to let all in")
    return known


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
