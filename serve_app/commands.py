"""The commands that talk to a running service: submit, watch, list, get, cancel, delete.

Results go to stdout and everything said to a person to stderr. Nothing here imports torch or Ray.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from serve_app.client import (
    ApiError,
    Client,
    ConnectionFailed,
    Ended,
    Priority,
    Progress,
    Queued,
    Resumed,
    SamplerName,
    Status,
    Unauthorized,
    Variant,
    Video,
    VideoFormat,
    VideoSettings,
)

_CANCELLED = 130  # what shells expect of a program that Ctrl-C ended
_COLUMNS = (("ID", 38), ("Status", 11), ("Step", 7), ("Created", 11))
_NARROWEST = 80  # no id is cut
_NAME_LETTERS = 22

commands = typer.Typer(pretty_exceptions_show_locals=False)  # one of the locals is the key

VideoId = Annotated[str, typer.Argument(metavar="ID", help="As submit and list show it.")]
Url = Annotated[str, typer.Option("--url", envvar="T2V_URL", help="Where the service is.")]
Key = Annotated[str | None, typer.Option("--key", envvar="T2V_KEY", help="The API key, if the service has keys.")]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts: JSON on stdout, and nothing else there.")]
LOCAL = "http://127.0.0.1:8000"


@commands.command()
def submit(
    prompt: Annotated[str, typer.Argument(help="What the video should show, in English.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Wait, and write the video to this .mp4, .webm or .gif file.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended.")] = False,
    model: Annotated[str | None, typer.Option(help="One of those that the service has.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels, multiples of 8.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length; not together with --num-frames.")] = None,
    num_frames: Annotated[int | None, typer.Option()] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="More steps, more detail: 1 to 999.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    sampler: Annotated[SamplerName | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same video.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    format: Annotated[VideoFormat | None, typer.Option(help="If the output's name does not say it.")] = None,
    priority: Annotated[Priority | None, typer.Option(help="Which of those that wait comes first.")] = None,
    webhook_url: Annotated[str | None, typer.Option(help="Told when the video has ended.")] = None,
    video: Annotated[str | None, typer.Option(help="Make it of this one: a file, or a completed video's id.")] = None,
    strength: Annotated[float | None, typer.Option(help="With --video: how much is made anew, up to 1.")] = None,
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Queue a video of what PROMPT says, and print its id."""
    if strength is not None and video is None:
        raise typer.BadParameter(f"--strength {strength:g}: is of an edit; give a --video as well, or leave it out")
    console = _console()
    with _explained(console), Client(url, key) as client:
        settings: VideoSettings = {
            "model": model,
            "size": size,
            "seconds": seconds,
            "num_frames": num_frames,
            "fps": fps,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "format": format if output is None else _format_of(output, format),
            "priority": priority,
            "webhook_url": webhook_url,
        }
        if video is None:
            made = client.create(prompt, **settings)
        else:
            # Path.exists raises for a name that is too long, and in a folder that is closed to us.
            source = Path(video) if os.path.exists(video) else video  # noqa: PTH110
            if isinstance(source, str) and not source.startswith("video_"):
                raise ApiError(f"video {video}: no such file, and no id of a video, which are like video_0123")
            made = client.edit(prompt, source, strength=strength, **settings)
        if not as_json:
            typer.echo(made.id)
        if wait or output is not None:
            with _left_running(console, made.id):
                made = watched(console, client, made.id)
                if output is not None and made.status == "completed":
                    _download(client, made.id, output, "video")
        else:
            _say(console, f"Queued; `t2v watch {made.id}` shows how far it is.")
        if as_json:
            typer.echo(made.model_dump_json())
        if wait or output is not None:
            _say_ended(console, made)


@commands.command()
def watch(video_id: VideoId, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Show how a video is made. Exit code 0: completed, 1: failed or cancelled. Ctrl-C leaves it running."""
    console = _console()
    with _explained(console), Client(url, key) as client, _left_running(console, video_id):
        video = _echoed(client, video_id) if as_json else watched(console, client, video_id)
        _say_ended(console, video)


@commands.command("list")
def list_videos(
    status: Annotated[Status | None, typer.Option(help="Only those in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")] = 20,
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List your videos, the newest first. With --json, one a line."""
    with _explained(_console()), Client(url, key) as client:
        page_size = 100 if status else min(limit, 100)
        wanted = (video for video in client.list(page_size=page_size) if status in (None, video.status))
        videos = islice(wanted, limit)
        if as_json:
            for video in videos:
                typer.echo(video.model_dump_json())
            return
        table = Table(box=None, padding=(0, 1, 0, 0), expand=True)
        for name, width in _COLUMNS:
            table.add_column(name, width=width)
        table.add_column("Prompt", no_wrap=True, overflow="ellipsis", ratio=1)
        for video in videos:
            created = datetime.fromtimestamp(video.created_at).strftime("%m-%d %H:%M")
            table.add_row(
                video.id, video.status, f"{video.step}/{video.num_steps}", created, Text(_printable(video.prompt))
            )
        Console(width=max(Console().width, _NARROWEST)).print(table)


@commands.command()
def get(
    video_id: VideoId,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the video to this file.")] = None,
    variant: Annotated[Variant | None, typer.Option(help="Another file of it; needs --output.")] = None,
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show a video's state and settings, or fetch its file."""
    console = _console()
    with _explained(console), Client(url, key) as client:
        if output is None and variant is not None:
            raise ApiError(f"variant {variant}: has no file to go to; name one with --output")
        if output is not None:
            _check_folder(output)
        video = client.retrieve(video_id)
        if output is not None:
            _download(client, video_id, output, variant or "video")
            _say(console, f"{output}: the {variant or 'video'} of {video_id}, {output.stat().st_size} bytes")
        if as_json:
            typer.echo(video.model_dump_json())
        elif output is None:
            for name, value in video.model_dump(exclude={"object"}, exclude_none=True).items():
                typer.echo(f"{name:<{_NAME_LETTERS}} {_printable(str(value))}")


@commands.command()
def cancel(video_id: VideoId, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Stop a video: at once while it is queued, at its next step while it is made."""
    console = _console()
    with _explained(console), Client(url, key) as client:
        video = client.cancel(video_id)
        if as_json:
            typer.echo(video.model_dump_json())
        stops = "is cancelled" if video.is_ended else "stops at its next step"
        _say(console, f"{video_id}: {stops}")


@commands.command()
def delete(video_id: VideoId, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Remove a video and its files. One that has not ended is cancelled first."""
    console = _console()
    with _explained(console), Client(url, key) as client:
        client.delete(video_id)
        if as_json:
            typer.echo(json.dumps({"id": video_id, "deleted": True}))
        _say(console, f"{video_id}: is removed")


def watched(console: Console, client: Client, video_id: str) -> Video:
    """The video once it has ended, with a bar on the console until then. Raises ApiError."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    events = client.events(video_id)
    first = list(islice(events, 1))  # where there is nothing to watch, no bar is drawn
    with ProgressBar(*columns, console=console) as bar:
        task = bar.add_task("Waiting", total=None, left="")
        for event in chain(first, events):
            if isinstance(event, Ended):
                video = event.video
                bar.update(task, completed=video.step, total=video.num_steps, description="Ended", left="")
                return video
            if isinstance(event, Queued):
                before = "" if event.position is None else f", {event.position} before it"
                bar.update(task, description=f"Queued{before}")
            elif isinstance(event, Resumed):
                _say(bar.console, f"{video_id}: its worker was lost; another goes on at step {event.step}")
            elif isinstance(event, Progress):
                left = "" if event.eta_s is None else f"{event.eta_s:.0f} s left"
                doing = "Denoising" if event.step < event.num_steps else "Decoding"
                bar.update(task, completed=event.step, total=event.num_steps, description=doing, left=left)
    return client.retrieve(video_id)


def _echoed(client: Client, video_id: str) -> Video:
    """The video once it has ended, with each event as a line of JSON until then."""
    for event in client.events(video_id):
        typer.echo(event.model_dump_json())
        if isinstance(event, Ended):
            return event.video
    return client.retrieve(video_id)


def _say_ended(console: Console, video: Video) -> None:
    """Say how it ended. Raises Exit for anything but completed."""
    if video.status == "completed":
        _say(console, f"{video.id}: completed, {video.size}, {video.num_frames} frames, seed {video.seed}")
        return
    reason = "" if video.error is None else f": {video.error.message} ({video.error.code})"
    _say(console, f"{video.id}: {video.status}{reason}")
    raise typer.Exit(1)


def _download(client: Client, video_id: str, output: Path, variant: Variant) -> None:
    try:
        client.download(video_id, output, variant)
    except OSError as error:
        raise ApiError(
            f"{output}: cannot be written ({error.strerror}); fetch it again with `t2v get {video_id} --output FILE`"
        ) from error


def _format_of(output: Path, format: VideoFormat | None) -> VideoFormat:
    """The format of a file of this name, found before the video is made for it. Raises ApiError."""
    _check_folder(output)
    suffix = output.suffix.lower().removeprefix(".")
    named = next((known for known in get_args(VideoFormat) if known == suffix), None)
    if named is None:
        raise ApiError(f"output {output}: must end in .{', .'.join(get_args(VideoFormat))}")
    if format not in (None, named):
        raise ApiError(f"format {format} for {output}: they differ; leave one out")
    return named


def _check_folder(output: Path) -> None:
    try:
        has_folder, is_folder = output.parent.is_dir(), output.is_dir()
    except OSError as error:  # too long a name, or a folder that is closed to us
        raise ApiError(f"output {output}: cannot be written ({error.strerror}); choose another path") from error
    if not has_folder:
        raise ApiError(f"output {output}: there is no folder {output.parent}; create it first")
    if is_folder or not os.access(output.parent, os.W_OK):
        raise ApiError(f"output {output}: a file cannot be written there; choose another path")


@contextmanager
def _explained(console: Console) -> Iterator[None]:
    """A known failure is one line and exit code 1, Ctrl-C is 130. None has a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        _say(console, "Interrupted.")
        raise typer.Exit(_CANCELLED) from None
    except ApiError as error:
        remedy = ""
        if isinstance(error, ConnectionFailed):
            remedy = " Start it with `t2v serve`, or name it with --url or T2V_URL."
        elif isinstance(error, Unauthorized):
            remedy = " Give the key with T2V_KEY or --key."
        _say(console, f"Error: {error}{remedy}")
        raise typer.Exit(1) from None


@contextmanager
def _left_running(console: Console, video_id: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say(console, f"{video_id} goes on: `t2v watch {video_id}` shows it again, `t2v cancel {video_id}` stops it.")
        raise typer.Exit(_CANCELLED) from None


def _printable(text: str) -> str:
    """One line without control characters: a prompt may be anybody's."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _say(console: Console, text: str) -> None:
    console.print(_printable(text), markup=False, soft_wrap=True, highlight=False)


def _console() -> Console:
    return Console(stderr=True)
