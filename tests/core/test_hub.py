"""Fetching a checkpoint: the real client library, in a process of its own, against a hub on this machine."""

import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, HubServer, Revision

from t2v_core import errors

REPO = "owner/model"
FIRST, SECOND = "1" * 40, "2" * 40
WEIGHTS, CONFIG, OTHER = "unet/weights.bin", "model_index.json", "text_encoder/weights.bin"
NEEDED = (WEIGHTS, CONFIG)
MIB = 1 << 20
LIBRARY_BLOCK = 10 * MIB  # what the library writes at once, so the grain at which it can resume

ROOT = Path(errors.__file__).parents[1]
CLIENT = """
import fnmatch, json, logging, os, resource, sys, types
from pathlib import Path
root, repo_id, revision, *patterns = sys.argv[1:]
for name in ("t2v_core", "t2v_core.weights"):  # without their __init__: importing torch takes seconds
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path(root, *name.split(".")))]
from t2v_core.errors import CheckpointError
from t2v_core.weights.hub import download

def select(names):
    chosen = [[name for name in names if fnmatch.fnmatchcase(name, pattern)] for pattern in patterns]
    if not all(chosen):
        raise CheckpointError("no weights here; give a checkpoint")
    return sum(chosen, [])

if "MAX_FILE_BYTES" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["MAX_FILE_BYTES"]),) * 2)
logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
try:
    answer = {"folder": str(download(repo_id, revision=revision or None, select=select))}
except CheckpointError as error:
    answer = {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
print(json.dumps(answer))
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call of `download` did: a folder, or an error with its kinds and message; and the log."""

    folder: Path | None
    error_kinds: list[str]
    message: str
    log: str
    wall_s: float

    def contents(self) -> dict[str, bytes]:
        assert self.folder is not None, self.message or self.log
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}


class Client:
    """Calls `download` in fresh processes that share one cache."""

    def __init__(self, hub_url: str, home: Path) -> None:
        self.home = home
        self.cache = home / "hub" / "models--owner--model"

        self.env = {
            "HF_ENDPOINT": hub_url,
            "HF_HOME": str(home),
            "HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    @contextmanager
    def start(
        self, repo_id: str, revision: str, patterns: tuple[str, ...], **env: str
    ) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(ROOT), repo_id, revision, *patterns],
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def run_command(self, command: str) -> None:
        """Run what an error message advises, with this Python's own scripts."""
        script, *arguments = shlex.split(command)
        path = Path(sys.executable).with_name(script)
        subprocess.run([path, *arguments], env=self.env, check=True, timeout=50, capture_output=True)

    def download(
        self, repo_id: str = REPO, revision: str = "", patterns: tuple[str, ...] = NEEDED, **env: str
    ) -> Outcome:
        started_s = time.monotonic()
        with self.start(repo_id, revision, patterns, **env) as process:
            out, log = process.communicate(timeout=50)
        assert process.returncode == 0, log
        answer: dict[str, Any] = json.loads(out)  # Any: JSON
        return Outcome(
            folder=Path(answer["folder"]) if "folder" in answer else None,
            error_kinds=answer.get("error", []),
            message=answer.get("message", ""),
            log=log,
            wall_s=time.monotonic() - started_s,
        )


def assert_not_found(outcome: Outcome, *parts: str) -> None:
    assert "CheckpointNotFound" in outcome.error_kinds, outcome
    for part in parts:
        assert part in outcome.message


def write_repository(folder: Path, seed: int, weights_bytes: int) -> Revision:
    draw = random.Random(seed)
    files = {
        WEIGHTS: weights_bytes,
        CONFIG: 100,
        OTHER: 2000,
        "README.md": 300,
        "odd[1].txt": 10,
        "odd1.txt": 10,
    }
    for name, num_bytes in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw.randbytes(num_bytes))
    return Revision(str(seed) * 40, folder)


def contents(revision: Revision, *names: str) -> dict[str, bytes]:
    return {name: (revision.folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Revision:
    return write_repository(tmp_path_factory.mktemp("first"), seed=1, weights_bytes=3 * MIB)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Revision:
    return write_repository(tmp_path_factory.mktemp("second"), seed=2, weights_bytes=25 * MIB)


@pytest.fixture
def hub(first: Revision, second: Revision) -> Iterator[HubServer]:
    server = HubServer(REPO, {"main": first, "v2": second})
    yield server
    server.close()


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


def test_only_the_chosen_files_are_fetched(hub: HubServer, client: Client, first: Revision) -> None:
    outcome = client.download()
    assert outcome.contents() == contents(first, *NEEDED)
    assert sorted(hub.fetched()) == sorted(NEEDED)


def test_a_name_with_brackets_stands_for_itself_only(hub: HubServer, client: Client) -> None:
    outcome = client.download(patterns=("odd[[]1].txt",))
    assert list(outcome.contents()) == ["odd[1].txt"] == hub.fetched()


def test_what_the_chooser_raises_reaches_the_caller(hub: HubServer, client: Client) -> None:
    outcome = client.download(patterns=("nothing",))
    assert (outcome.error_kinds[0], outcome.message) == (
        "CheckpointError",
        "no weights here; give a checkpoint",
    )
    assert hub.fetched() == []


def test_a_second_call_downloads_nothing_again(hub: HubServer, client: Client, first: Revision) -> None:
    client.download()
    before = len(hub.requests)
    assert client.download().contents() == contents(first, *NEEDED)
    assert [request.path for request in hub.requests[before:]] == [f"/api/models/{REPO}/revision/main"]


def test_a_broken_transfer_resumes_where_it_broke(hub: HubServer, client: Client, second: Revision) -> None:
    hub.faults.append(Fault(WEIGHTS, after_bytes=LIBRARY_BLOCK + 7 * MIB))
    hub.faults.append(Fault(WEIGHTS, after_bytes=2 * LIBRARY_BLOCK + 4 * MIB))
    outcome = client.download(revision="v2")
    assert outcome.contents() == contents(second, *NEEDED)
    starts = [r.range_start for r in hub.requests if r.method == "GET" and r.file_name == WEIGHTS]
    assert starts == [0, LIBRARY_BLOCK, 2 * LIBRARY_BLOCK]


def test_a_connection_that_is_reset_is_tried_again(hub: HubServer, client: Client, second: Revision) -> None:
    hub.faults.append(Fault(WEIGHTS, after_bytes=15 * MIB, then="reset"))
    outcome = client.download(revision="v2")
    assert outcome.contents() == contents(second, *NEEDED)
    assert (hub.fetched().count(WEIGHTS), hub.fetched().count(CONFIG)) == (2, 1)
    assert "trying again" in outcome.log


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/revision/main", HTTPStatus.SERVICE_UNAVAILABLE),
        (WEIGHTS, HTTPStatus.INTERNAL_SERVER_ERROR),
        (WEIGHTS, HTTPStatus.FORBIDDEN),  # how the CDN answers to a link that has expired
    ],
)
def test_a_passing_failure_of_the_hub_is_tried_again(
    hub: HubServer, client: Client, first: Revision, path: str, status: HTTPStatus
) -> None:
    hub.faults.append(Fault(path, status=status))
    assert client.download().contents() == contents(first, *NEEDED)


def test_a_file_of_the_wrong_size_never_enters_the_cache(hub: HubServer, client: Client) -> None:
    hub.faults.append(Fault(WEIGHTS, times=99, after_bytes=2 * MIB, then="shorten"))
    outcome = client.download()
    assert outcome.error_kinds[0] == "CheckpointError"
    assert WEIGHTS.rpartition("/")[2] in outcome.message
    assert f"size {3 * MIB} but has size {2 * MIB}" in outcome.message
    assert_not_found(client.download(HF_HUB_OFFLINE="1"), REPO)


def test_a_disk_that_takes_no_more_is_a_clear_error(hub: HubServer, client: Client) -> None:
    outcome = client.download(MAX_FILE_BYTES=str(MIB))
    assert outcome.error_kinds[0] == "CheckpointError"
    assert f"cannot write to {client.home}" in outcome.message
    assert_not_found(client.download(HF_HUB_OFFLINE="1"), REPO)


def test_a_killed_download_counts_for_nothing_and_is_completed_by_the_next(
    hub: HubServer, client: Client, second: Revision
) -> None:
    held = Fault(WEIGHTS, after_bytes=15 * MIB, then="hold")
    hub.faults.append(held)
    with client.start(REPO, "v2", NEEDED, HF_HUB_DOWNLOAD_TIMEOUT="40"):
        assert held.reached.wait(20)
        while not list(client.cache.glob(f"snapshots/*/{CONFIG}")):
            time.sleep(0.02)
    for revision in ("v2", SECOND):
        assert_not_found(client.download(revision=revision, HF_HUB_OFFLINE="1"), REPO)
    assert client.download(revision="v2").contents() == contents(second, *NEEDED)
    assert hub.fetched().count(CONFIG) == 1


@pytest.mark.parametrize(("revision", "commit"), [("", FIRST), ("v2", SECOND), (FIRST, FIRST)])
def test_a_branch_a_tag_or_a_commit_is_honoured(
    hub: HubServer, client: Client, first: Revision, second: Revision, revision: str, commit: str
) -> None:
    hub.revisions["main"] = second if revision == FIRST else first
    outcome = client.download(revision=revision)
    assert outcome.contents() == contents({FIRST: first, SECOND: second}[commit], *NEEDED)
    assert outcome.folder is not None
    assert outcome.folder.name == commit
    assert client.download(revision=revision, HF_HUB_OFFLINE="1").folder == outcome.folder


def test_a_commit_that_lands_after_the_listing_is_not_mixed_in(
    hub: HubServer, client: Client, first: Revision, second: Revision
) -> None:
    hub.after_listing = lambda: hub.revisions.update(main=second)
    assert client.download().contents() == contents(first, *NEEDED)
    assert client.download().contents() == contents(second, *NEEDED)


def test_offline_a_full_cache_serves_and_asks_nobody(hub: HubServer, client: Client, first: Revision) -> None:
    client.download()
    before = len(hub.requests)
    outcome = client.download(HF_HUB_OFFLINE="1")
    assert outcome.contents() == contents(first, *NEEDED)
    assert len(hub.requests) == before
    assert "WARNING" not in outcome.log


def test_offline_a_cache_that_lacks_a_file_is_a_clear_error(hub: HubServer, client: Client) -> None:
    client.download(patterns=(CONFIG,))
    outcome = client.download(HF_HUB_OFFLINE="1")
    assert_not_found(outcome, REPO, "main", f"lacks {WEIGHTS}", "offline", f"hf download {REPO}", "folder")


def test_offline_an_empty_cache_is_a_clear_error_and_the_remedy_works(hub: HubServer, client: Client) -> None:
    outcome = client.download(HF_HUB_OFFLINE="1")
    assert_not_found(outcome, REPO, "main", str(client.home), "offline mode", f"hf download {REPO}", "folder")
    assert hub.requests == []
    client.run_command(outcome.message.split("`")[1])
    assert set(client.download(HF_HUB_OFFLINE="1").contents()) >= set(NEEDED)


def test_offline_a_cache_without_a_listing_serves_what_it_holds(
    hub: HubServer, client: Client, first: Revision
) -> None:
    client.download(patterns=(CONFIG,))
    shutil.rmtree(client.cache / "trees")  # as older releases of the library leave it
    assert client.download(patterns=(CONFIG,), HF_HUB_OFFLINE="1").contents() == contents(first, CONFIG)
    outcome = client.download(patterns=(WEIGHTS,), HF_HUB_OFFLINE="1")
    assert_not_found(outcome, "no weights here", f"hf download {REPO}")


def test_offline_a_broken_update_leaves_the_last_whole_snapshot(
    hub: HubServer, client: Client, first: Revision, second: Revision
) -> None:
    client.download()
    hub.revisions["main"] = second
    hub.faults.append(Fault(WEIGHTS, status=HTTPStatus.GONE))
    assert client.download().folder is None
    assert client.download(HF_HUB_OFFLINE="1").contents() == contents(first, *NEEDED)


def test_offline_an_update_of_which_a_part_was_fetched_leaves_the_last_whole_snapshot(
    hub: HubServer, client: Client, first: Revision, second: Revision
) -> None:
    client.download()
    hub.revisions["main"] = second
    assert client.download(patterns=(CONFIG,)).contents() == contents(second, CONFIG)
    assert client.download(HF_HUB_OFFLINE="1").contents() == contents(first, *NEEDED)
    client.download(patterns=(WEIGHTS,))
    assert client.download(HF_HUB_OFFLINE="1").contents() == contents(second, *NEEDED)


def test_a_cached_file_that_was_cut_short_is_noticed_and_the_remedy_works(
    hub: HubServer, client: Client, first: Revision
) -> None:
    folder = client.download().folder
    assert folder is not None
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(MIB)
    assert_not_found(client.download(HF_HUB_OFFLINE="1"), f"lacks {WEIGHTS}")
    outcome = client.download()
    assert outcome.error_kinds[0] == "CheckpointError"
    assert f"does not hold {WEIGHTS} whole" in outcome.message
    client.run_command(outcome.message.split("`")[1])
    assert client.download().contents() == contents(first, *NEEDED)


def test_without_a_network_the_error_is_clear_and_quick(hub: HubServer, client: Client) -> None:
    hub.close()
    outcome = client.download()
    assert_not_found(outcome, REPO, "main", hub.url, "refused", "connect", f"hf download {REPO}", "folder")
    assert outcome.wall_s < 5


def test_without_a_network_a_cache_serves_and_warns(hub: HubServer, client: Client, first: Revision) -> None:
    client.download()
    hub.close()
    outcome = client.download()
    assert outcome.contents() == contents(first, *NEEDED)
    assert "t2v_core.weights.hub WARNING hub unreachable" in outcome.log
    assert outcome.wall_s < 5


def test_a_silent_hub_is_not_waited_for(hub: HubServer, client: Client) -> None:
    hub.faults.append(Fault("/revision/main", then="hold"))
    outcome = client.download(HF_HUB_ETAG_TIMEOUT="1")
    assert_not_found(outcome, REPO, "timed out")
    assert outcome.wall_s < 5


@pytest.mark.parametrize("status", [HTTPStatus.BAD_GATEWAY, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.OK])
def test_a_hub_in_trouble_is_as_good_as_none(
    hub: HubServer, client: Client, first: Revision, status: HTTPStatus
) -> None:
    client.download()
    # OK without content is how a captive portal may answer.
    hub.faults.append(Fault("/revision/main", times=99, status=status))
    outcome = client.download()
    assert outcome.contents() == contents(first, *NEEDED)
    assert "hub unreachable" in outcome.log


def test_a_hub_lost_between_listing_and_files_is_a_clear_error(hub: HubServer, client: Client) -> None:
    hub.faults.append(Fault("/tree/" + FIRST, times=99, status=HTTPStatus.NOT_IMPLEMENTED))
    assert_not_found(client.download(), REPO, "connect")


@pytest.mark.parametrize("repo_id", ["owner/other", "other"])
def test_an_unknown_repository_is_a_clear_error(hub: HubServer, client: Client, repo_id: str) -> None:
    assert_not_found(client.download(repo_id=repo_id), repo_id, hub.url, "hf auth login")


def test_a_private_repository_is_a_clear_error(hub: HubServer, client: Client) -> None:
    hub.faults.append(Fault("/revision/main", status=HTTPStatus.UNAUTHORIZED))
    assert_not_found(client.download(), REPO, "private", "hf auth login")


def test_a_gated_repository_is_a_clear_error(hub: HubServer, client: Client) -> None:
    hub.is_gated = True
    assert_not_found(client.download(), REPO, "access on request", f"{hub.url}/{REPO}", "hf auth login")


def test_an_unknown_revision_is_a_clear_error(hub: HubServer, client: Client) -> None:
    assert_not_found(client.download(revision="v3"), REPO, "v3", "no such branch, tag or commit")


@pytest.mark.parametrize("repo_id", ["a/b/c", "owner/two words"])
def test_a_malformed_id_is_a_clear_error(hub: HubServer, client: Client, repo_id: str) -> None:
    assert_not_found(client.download(repo_id=repo_id), repo_id, "owner/name", "folder")
    assert hub.requests == []
