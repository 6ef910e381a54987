"""The commands for a running service, against the real API."""

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from anyio import to_thread
from api_service import ALICE, BOB, KEYS, UNKNOWN, Service
from rich.console import Console
from typer.testing import CliRunner, Result

from serve_app.cli import _make_first, app
from t2v_core.errors import GenerationFailed

pytestmark = pytest.mark.anyio


async def t2v(url: str, *arguments: object, **environment: str) -> Result:
    """Run a command in a thread, since the service runs in this one."""
    given = {"T2V_URL": url, "COLUMNS": "200", **environment}
    run = functools.partial(CliRunner().invoke, app, [str(argument) for argument in arguments], env=given)
    result = await to_thread.run_sync(run)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


async def started(url: str, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
    """A command in a process of its own."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serve_app.cli", *arguments, "--url", url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, where the command runs."""
    path = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(path)
    return path


def is_empty(folder: Path) -> bool:
    return not list(folder.iterdir())


async def num_videos(service: Service) -> int:
    return len((await service.client.get("/v1/videos")).json()["data"])


async def test_submit_prints_the_id_alone(service: Service) -> None:
    result = await t2v(service.url, "submit", "a red circle", "--seed", "7", "--num-frames", "3", "--sampler", "ddim")
    assert result.exit_code == 0, result.output
    video = (await service.client.get(f"/v1/videos/{result.stdout.strip()}")).json()
    assert (video["prompt"], video["seed"], video["num_frames"], video["sampler"]) == ("a red circle", 7, 3, "ddim")
    assert f"t2v watch {video['id']}" in result.stderr


async def test_submit_waits_and_writes_the_video_in_the_format_of_its_name(service: Service, tmp_path: Path) -> None:
    async with service.working():
        result = await t2v(service.url, "submit", "a", "--output", tmp_path / "circle.webm")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "circle.webm").read_bytes() == service.files.video
    video = (await service.client.get(f"/v1/videos/{result.stdout.strip()}")).json()
    assert video["format"] == "webm"
    assert f"{video['id']}: completed" in result.stderr


async def test_submit_for_scripts_prints_one_object(service: Service) -> None:
    queued = await t2v(service.url, "submit", "a", "--json")
    assert json.loads(queued.stdout)["status"] == "queued"
    async with service.working():
        completed = await t2v(service.url, "submit", "a", "--json", "--wait")
    assert json.loads(completed.stdout)["status"] == "completed"
    assert (queued.exit_code, completed.exit_code) == (0, 0)


async def test_watch_shows_the_steps_and_how_it_ended(service: Service) -> None:
    video = await service.create(seed=7)
    async with service.working():
        result = await t2v(service.url, "watch", video["id"])
    assert result.exit_code == 0, result.output
    assert "5/5" in result.stderr
    assert f"{video['id']}: completed, 64x48, 8 frames, seed 7" in result.stderr
    assert result.stdout == ""


async def test_watch_for_scripts_prints_each_event_as_a_line(service: Service) -> None:
    video = await service.create()
    async with service.working():
        result = await t2v(service.url, "watch", video["id"], "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events][-2:] == ["progress", "completed"]
    assert events[-1]["video"]["id"] == video["id"]
    assert result.exit_code == 0


@pytest.mark.parametrize("arguments", [["watch"], ["watch", "--json"]])
async def test_a_video_that_failed_is_exit_code_1_and_says_why(service: Service, arguments: list[str]) -> None:
    video = await service.create()
    await (await service.claim()).fail()
    result = await t2v(service.url, *arguments, video["id"])
    assert result.exit_code == 1
    assert f"{video['id']}: failed: values were not finite (generation_failed)" in result.stderr


async def test_a_video_that_is_cancelled_while_submit_waits_is_exit_code_1(service: Service, folder: Path) -> None:
    running = asyncio.create_task(t2v(service.url, "submit", "a", "--output", "a.mp4", "--json"))
    while not await num_videos(service):  # noqa: ASYNC110  # it is told in no other way
        await asyncio.sleep(0.02)
    (video,) = (await service.client.get("/v1/videos")).json()["data"]
    await service.client.post(f"/v1/videos/{video['id']}/cancel")
    result = await running
    assert result.exit_code == 1
    assert json.loads(result.stdout)["status"] == "cancelled"
    assert is_empty(folder)


async def test_list_shows_the_newest_first(service: Service) -> None:
    ids = [(await service.create(prompt=f"number {number}"))["id"] for number in range(3)]
    result = await t2v(service.url, "list", "--limit", "2")
    assert result.exit_code == 0, result.output
    _, *rows = result.stdout.splitlines()
    assert [row.split()[0] for row in rows] == [ids[2], ids[1]]
    assert "queued" in rows[0]
    assert "number 2" in rows[0]


async def test_list_shows_whole_ids_in_a_narrow_terminal(service: Service) -> None:
    video = await service.create(prompt="a long prompt " * 20)
    for width in (40, 80):
        result = await t2v(service.url, "list", COLUMNS=str(width))
        _, row = result.stdout.splitlines()
        assert row.startswith(f"{video['id']} queued")
        assert "a long" in row


async def test_list_for_scripts_prints_each_video_as_a_line(service: Service) -> None:
    completed = await service.completed()
    queued = await service.create()
    every = await t2v(service.url, "list", "--json")
    assert [json.loads(line)["id"] for line in every.stdout.splitlines()] == [queued["id"], completed["id"]]
    (line,) = (await t2v(service.url, "list", "--json", "--status", "completed")).stdout.splitlines()
    assert json.loads(line) == completed


async def test_a_prompt_cannot_write_to_the_terminal_as_it_likes(service: Service) -> None:
    video = await service.create(prompt="[red]a[/red] \x1b[2J\nsecond")
    shown = [await t2v(service.url, "list"), await t2v(service.url, "get", video["id"])]
    for result in shown:
        assert "[red]a[/red]  [2J second" in result.stdout
        assert "\x1b" not in result.stdout


async def test_get_shows_what_the_video_is(service: Service) -> None:
    video = await service.completed(seed=7)
    result = await t2v(service.url, "get", video["id"])
    shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if " " in line.strip())
    assert (shown["id"], shown["status"], shown["seed"]) == (video["id"], "completed", "7")
    assert json.loads((await t2v(service.url, "get", video["id"], "--json")).stdout) == video


@pytest.mark.parametrize("variant", [None, "video", "thumbnail", "spritesheet"])
async def test_get_writes_each_file(service: Service, tmp_path: Path, variant: str | None) -> None:
    video, output = await service.completed(), tmp_path / "file"
    options = [] if variant is None else ["--variant", variant]
    result = await t2v(service.url, "get", video["id"], "--output", output, *options)
    assert result.exit_code == 0, result.output
    assert output.read_bytes() == getattr(service.files, variant or "video")
    assert str(output) in result.stderr
    assert result.stdout == ""


async def test_cancel_and_delete_say_what_they_did(service: Service) -> None:
    video = await service.create()
    result = await t2v(service.url, "cancel", video["id"])
    assert (result.exit_code, f"{video['id']}: is cancelled" in result.stderr) == (0, True)
    result = await t2v(service.url, "delete", video["id"], "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"id": video["id"], "deleted": True})
    assert await num_videos(service) == 0


async def test_cancel_of_a_running_video_says_that_it_still_stops(service: Service) -> None:
    video = await service.create()
    await service.claim()
    result = await t2v(service.url, "cancel", video["id"], "--json")
    assert json.loads(result.stdout)["status"] == "in_progress"
    assert "stops at its next step" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "a", "--size", "100x64"], "width 100: must be a multiple of 8"),
        (["submit", "a", "--model", "gone"], "model 'gone': is not served here"),
        (["submit", "a", "--output", "a.avi"], "output a.avi: must end in .mp4, .webm, .gif"),
        (["submit", "a", "--output", "a.gif", "--format", "mp4"], "format mp4 for a.gif: they differ"),
        (["submit", "a", "--output", "no/folder/a.mp4"], "there is no folder no/folder; create it first"),
        (["submit", "a", "--output", f"{'x' * 300}.mp4"], "cannot be written (File name too long)"),
        (["get", UNKNOWN, "--output", f"{'x' * 300}/a.mp4"], "cannot be written (File name too long)"),
        (["submit", "a", "--video", "."], "video '.': cannot be read (Is a directory); name a file"),
        (["submit", "a", "--video", "mine.mp4"], "video mine.mp4: no such file, and no id of a video"),
        (["submit", "a", "--video", "a" * 300], "no such file, and no id of a video"),
        (["submit", "a", "--video", UNKNOWN], "there is none of this id"),
        (["submit", "a\udcff"], "surrogates not allowed"),
        (["submit", "a", "--guidance-scale", "nan"], "numbers must be finite"),
        (["get", UNKNOWN], UNKNOWN),
        (["get", UNKNOWN, "--variant", "thumbnail"], "name one with --output"),
        (["get", UNKNOWN, "--output", ".."], "output ..: a file cannot be written there"),
        (["watch", UNKNOWN], UNKNOWN),
        (["watch", "../models"], "id '../models'"),
        (["cancel", UNKNOWN], UNKNOWN),
        (["delete", UNKNOWN], UNKNOWN),
        (["list", "--url", "localhost:8000"], "base_url 'localhost:8000': must be like http://127.0.0.1:8000"),
    ],
)
async def test_a_mistake_is_one_line_and_makes_nothing(
    service: Service, folder: Path, arguments: list[str], message: str
) -> None:
    for for_scripts in ([], ["--json"]):
        result = await t2v(service.url, *arguments, *for_scripts)
        assert result.exit_code == 1
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ")
        assert message in line
    assert await num_videos(service) == 0
    assert is_empty(folder)


async def test_a_service_that_is_not_there_is_told_with_what_to_do() -> None:
    result = await t2v("http://127.0.0.1:9", "list")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "http://127.0.0.1:9: cannot be reached" in line
    assert "`t2v serve`" in line


async def test_the_key_comes_from_the_environment_or_an_option(run_service: Any) -> None:
    service = await run_service(keys=KEYS, key=ALICE)
    video = await service.create()
    without = await t2v(service.url, "get", video["id"])
    assert (without.exit_code, "T2V_KEY" in without.stderr) == (1, True)
    assert (await t2v(service.url, "get", video["id"], T2V_KEY=ALICE)).exit_code == 0
    assert (await t2v(service.url, "get", video["id"], "--key", ALICE, T2V_KEY=BOB)).exit_code == 0
    others = await t2v(service.url, "get", video["id"], T2V_KEY=BOB)
    assert (others.exit_code, BOB in others.output) == (1, False)


async def test_in_a_process_of_its_own(service: Service) -> None:
    video = await service.create()
    process = await started(service.url, "list", "--json")
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert json.loads(out)["id"] == video["id"]


async def test_ctrl_c_leaves_the_video_running_and_says_so(service: Service) -> None:
    video = await service.create()
    work = await service.claim()
    await work.step(1)
    process = await started(service.url, "watch", video["id"], "--json")
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["event"] == "progress"
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    assert process.returncode == 130
    assert f"{video['id']} goes on" in err.decode()
    assert "Traceback" not in err.decode()
    assert out == b""
    assert await work.step(2) == set()  # nobody asks for it to be cancelled


async def test_the_first_video_of_serve_is_made_as_any_client_makes_one(
    service: Service, folder: Path, capsys: Any
) -> None:
    output = folder / "new" / "[red]first.mp4"  # no markup
    make = functools.partial(_make_first, Console(stderr=True, width=500), service.url, "a", output, None)
    async with service.working():
        await to_thread.run_sync(make)
    assert output.read_bytes() == service.files.video
    assert f"{output}: " in capsys.readouterr().err


async def test_a_first_video_that_fails_says_why(service: Service, folder: Path) -> None:
    make = functools.partial(_make_first, Console(stderr=True), service.url, "a", folder / "first.mp4", None)
    making = asyncio.create_task(to_thread.run_sync(make))
    while not await num_videos(service):  # noqa: ASYNC110  # it is told in no other way
        await asyncio.sleep(0.02)
    await (await service.claim()).fail()
    with pytest.raises(GenerationFailed, match="values were not finite"):
        await making
    assert is_empty(folder)


def test_a_command_for_a_service_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from serve_app.cli import app\n"
        "app(['list', '--url', 'http://127.0.0.1:9'], standalone_mode=False)\n"
        "print({'torch', 'ray', 't2v_core'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot be reached" in out.stderr
    assert out.stdout.strip() == "set()"


def test_the_commands_of_the_core_are_there_too() -> None:
    listed = CliRunner().invoke(app, ["--help"]).output
    for name in ("generate", "convert", "random-checkpoint", "serve", "submit", "watch"):
        assert f" {name} " in listed
    mistake = CliRunner().invoke(app, ["generate", "a", "--size", "large"])
    assert (mistake.exit_code, "size large: must be like 256x256" in mistake.output) == (2, True)
