"""A small Hugging Face hub on 127.0.0.1: the part of its protocol that a download needs, and its faults."""

import hashlib
import http.server
import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

LARGE_SUFFIXES = (".bin", ".pth", ".safetensors")  # kept in large-file storage, served by the CDN


@dataclass(frozen=True, slots=True)
class Revision:
    """A branch or tag, as it stands."""

    commit: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    range_start: int

    @property
    def file_name(self) -> str | None:
        """The repository's file that this request is about, if it is about one."""
        for marker in ("/resolve/", "/cdn/"):
            if marker in self.path:
                return self.path.partition(marker)[2].partition("/")[2]
        return None


@dataclass(slots=True)
class Fault:
    """What befalls the next `times` GET requests whose path ends in `path`.

    With a `status`, that answer and no more. Otherwise the body stops after `after_bytes`, and then: "close"
    ends the connection in order, "reset" resets it, "hold" stays silent until the server closes, "shorten"
    pretends that this was all.
    """

    path: str
    times: int = 1
    status: HTTPStatus | None = None
    error_code: str | None = None
    after_bytes: int = 0
    then: Literal["close", "reset", "hold", "shorten"] = "close"
    reached: threading.Event = field(default_factory=threading.Event)


class HubServer:
    """Serves one repository. `revisions` may change while it runs; commits stay reachable by their hash.

    A gated repository shows its listing to everyone and its files to nobody, as the real hub does.
    """

    def __init__(self, repo_id: str, revisions: dict[str, Revision]) -> None:
        self.repo_id = repo_id
        self.revisions = revisions
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.is_gated = False
        self.after_listing: Callable[[], None] = lambda: None
        self.is_closing = threading.Event()
        self.lock = threading.Lock()
        self._folders = {revision.commit: revision.folder for revision in revisions.values()}
        # The CDN is another origin, as in the real world: the library keeps its token from it.
        self._hub, self._cdn = _Server(self), _Server(self)
        self.url, self.cdn_url = self._hub.url, self._cdn.url

    def close(self) -> None:
        """End every connection and free both ports. A second call does nothing."""
        self.is_closing.set()
        self._hub.stop()
        self._cdn.stop()

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order, as often as it was."""
        return [r.file_name for r in self.requests if r.method == "GET" and r.file_name is not None]

    def resolve(self, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder that a branch, a tag or a commit means now."""
        with self.lock:
            self._folders.update((r.commit, r.folder) for r in self.revisions.values())
            commit = self.revisions[revision].commit if revision in self.revisions else revision
            return (commit, self._folders[commit]) if commit in self._folders else None

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if method == "GET" and fault.times > 0 and path.endswith(fault.path):
                    fault.times -= 1
                    return fault
        return None


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for every connection's thread

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
            self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10.0
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        with hub.lock:
            hub.requests.append(Request(self.command, path, start))
        fault = hub.take_fault(self.command, path)
        if fault is not None and fault.status is not None:
            self._refuse(fault.status, fault.error_code)
        elif path.startswith("/cdn/"):
            commit, _, name = path.removeprefix("/cdn/").partition("/")
            self._send_file(commit, name, start, fault)
        elif path.startswith(f"/api/models/{hub.repo_id}/revision/"):
            if fault is not None:
                self._break_off(fault)
            else:
                self._send_info(path.partition("/revision/")[2])
        elif path.startswith(f"/api/models/{hub.repo_id}/tree/"):
            self._send_tree(path.partition("/tree/")[2])
        elif path.startswith(f"/{hub.repo_id}/resolve/"):
            revision, _, name = path.partition("/resolve/")[2].partition("/")
            self._resolve(revision, name, start, fault)
        else:  # the hub does not tell a stranger what exists
            self._refuse(HTTPStatus.UNAUTHORIZED, "RepoNotFound")

    def _send_info(self, revision: str) -> None:
        found = self.server.hub.resolve(revision)
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
            return
        commit, folder = found
        siblings = [{"rfilename": name, "size": size} for name, size in _sizes(folder).items()]
        self.server.hub.after_listing()
        self._send_json({"id": self.server.hub.repo_id, "sha": commit, "siblings": siblings})

    def _send_tree(self, revision: str) -> None:
        found = self.server.hub.resolve(revision)
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
            return
        entries: list[dict[str, object]] = []
        for name, size in _sizes(found[1]).items():
            path = found[1] / name
            entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": _git_hash(path)}
            if name.endswith(LARGE_SUFFIXES):
                entry["lfs"] = {"oid": _sha256(path), "size": size, "pointerSize": 134}
            entries.append(entry)
        self._send_json(entries)

    def _resolve(self, revision: str, name: str, start: int, fault: Fault | None) -> None:
        found = self.server.hub.resolve(revision)
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        elif self.server.hub.is_gated:
            self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        elif not (found[1] / name).is_file():
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")
        elif name.endswith(LARGE_SUFFIXES):
            self._redirect(found[0], found[1], name)
        else:
            self._send_file(found[0], name, start, fault)

    def _redirect(self, commit: str, folder: Path, name: str) -> None:
        self.send_response(HTTPStatus.FOUND)
        self.send_header("Location", f"{self.server.hub.cdn_url}/cdn/{commit}/{name}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Etag", f'"{_sha256(folder / name)}"')
        self.send_header("X-Linked-Size", str((folder / name).stat().st_size))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, commit: str, name: str, start: int, fault: Fault | None) -> None:
        found = self.server.hub.resolve(commit)
        assert found is not None
        path = found[1] / name
        size = path.stat().st_size
        end = min(size, fault.after_bytes) if fault else size
        promised = end if fault and fault.then == "shorten" else size
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{promised - 1}/{promised}")
        self.send_header("ETag", f'"{_git_hash(path)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(promised - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file, suppress(ConnectionError):  # the client may leave
            file.seek(start)
            left = max(end - start, 0)
            while left and (block := file.read(min(left, 1 << 20))):
                self.wfile.write(block)
                left -= len(block)
        if fault is not None and fault.then != "shorten":
            self._break_off(fault)

    def _break_off(self, fault: Fault) -> None:
        self.close_connection = True
        fault.reached.set()
        if fault.then == "hold":
            self.server.hub.is_closing.wait(30)
        elif fault.then == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _send_json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, error_code: str | None) -> None:
        self.send_response(status)
        if error_code is not None:
            self.send_header("X-Error-Code", error_code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _sizes(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_hash(path: Path) -> str:
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()
