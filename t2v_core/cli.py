"""The command line: `t2v generate`, `t2v convert`, `t2v random-checkpoint`."""

import logging
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, get_args

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from t2v_core.config import MAX_CACHED_STEPS, DType, GenerationDefaults, ModelConfig, Precision, SamplerName
from t2v_core.errors import InvalidRequest, OutputError, T2VError
from t2v_core.media import VideoFormat, check_encoding, video_format_of
from t2v_core.params import MAX_SEED, GenerationParams, Settings, check_strength, resolve
from t2v_core.pipeline import DTYPES, Pipeline, load
from t2v_core.video import Video
from t2v_core.video_input import read_video
from t2v_core.weights import DEMO, check_new, open_checkpoint
from t2v_core.weights import convert as convert_checkpoint
from t2v_core.weights.random_init import TINY, write_random_checkpoint

_CANCELLED = 130  # what shells expect of a program that Ctrl-C ended

app = typer.Typer(
    help="Text to video with ModelScope's 1.7 B diffusion model.", no_args_is_help=True, add_completion=False
)


@app.callback()
def _logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=_console())])


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video should show, in English.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="An .mp4, .webm or .gif file.")] = None,
    model: Annotated[str, typer.Option(help="demo, a folder, or a Hugging Face id.")] = DEMO,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the model on the hub.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels, multiples of 8.")] = None,
    num_frames: Annotated[int | None, typer.Option()] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="More steps, more detail: 1 to 999.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    sampler: Annotated[SamplerName | None, typer.Option()] = None,
    eta: Annotated[float | None, typer.Option(help="Noise of the ddim sampler, 0 to 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same video.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None,
    input_video: Annotated[Path | None, typer.Option(help="Make this video anew instead of starting at noise.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of the input video is replaced, 0 to 1.")] = None,
    format: Annotated[VideoFormat | None, typer.Option(help="If the output's name does not say it.")] = None,
    crf: Annotated[int | None, typer.Option(help="Quality of mp4 and webm: lower is better and larger.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="fp16 on a GPU and fp32 on a CPU, unless given: fp16 takes a CPU several times as long."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="fp8: faster on a Hopper GPU, not quite exact.")] = "exact",
    cached_steps: Annotated[
        int,
        typer.Option(min=0, max=MAX_CACHED_STEPS, help="Steps in a row that reuse coarse features: faster, not exact."),
    ] = 0,
) -> None:
    """Make a video of what PROMPT says."""
    console = _console()
    with errors_explained(console):
        destination = _destination(output, format)
        width, height = _sides(size)
        settings: Settings = {
            "negative_prompt": negative_prompt,
            "width": width,
            "height": height,
            "num_frames": num_frames,
            "fps": fps,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "eta": eta,
            "seed": seed,
            "strength": strength,
            "format": video_format_of(destination),
        }
        _check_before_loading(prompt, settings, input_video, crf)
        console.print(f"Loading {model}", soft_wrap=True, highlight=False)
        pipeline = load(
            model, revision=revision, device=device, dtype=dtype, precision=precision, cached_steps=cached_steps
        )
        params = pipeline.params(prompt, video=input_video, **settings)
        started = time.monotonic()
        video = _generate(console, pipeline, params)
        _save(video, destination, crf)
        seconds = time.monotonic() - started
        console.print(
            f"{destination}: {params.num_frames} frames of {params.width}x{params.height}, seed {params.seed}, "
            f"{params.num_steps} steps of {params.sampler} at guidance {params.guidance_scale:g}",
            soft_wrap=True,
            highlight=False,
        )
        console.print(
            f"{seconds:.1f} s on {pipeline.device} in {str(pipeline.dtype).removeprefix('torch.')}, "
            f"peak memory {_peak_memory_bytes(pipeline.device) / 2**30:.1f} GiB",
            soft_wrap=True,
            highlight=False,
        )


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="demo, a folder, or a Hugging Face id, in either layout.")],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of the source on the hub.")] = None,
    dtype: Annotated[DType, typer.Option(help="fp16 halves the size of the files.")] = "fp32",
) -> None:
    """Write a checkpoint in the diffusers layout, as safetensors."""
    console = _console()
    with errors_explained(console):
        check_new(destination)
        checkpoint = open_checkpoint(source, revision=revision, half=dtype == "fp16")
        with console.status(Text(f"Converting {source}")), _cleared_up_when_ended():
            convert_checkpoint(checkpoint, destination, DTYPES[dtype])
        console.print(f"{destination}: written in {dtype}", soft_wrap=True, highlight=False)


@app.command("random-checkpoint")
def random_checkpoint(
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    size: Annotated[Literal["tiny", "full"], typer.Option(help="full is as large as the released model.")] = "tiny",
    dtype: Annotated[DType, typer.Option()] = "fp32",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
) -> None:
    """Write a checkpoint of random weights, to try or to measure without a download. Its videos show nothing."""
    console = _console()
    with errors_explained(console):
        config = TINY if size == "tiny" else ModelConfig()
        with console.status("Drawing weights"), _cleared_up_when_ended():
            write_random_checkpoint(destination, config, seed=seed, dtype=DTYPES[dtype])
        console.print(f"{destination}: written in {dtype}", soft_wrap=True, highlight=False)


def _generate(console: Console, pipeline: Pipeline, params: GenerationParams) -> Video:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        denoising = progress.add_task("Denoising", total=params.num_steps)
        for trajectory in pipeline.denoise(params):
            progress.update(denoising, completed=trajectory.step_index)
            latents = trajectory.latents
        progress.update(denoising, description="Decoding ")
        return Video(pipeline.decode(latents), params, pipeline.name)


def _check_before_loading(prompt: str, settings: Settings, input_video: Path | None, crf: int | None) -> None:
    """Find a mistake before gigabytes are fetched for it, as far as the checkpoint need not be known."""
    strength = settings.get("strength")
    if input_video is not None:
        settings = {**settings, "strength": None}  # without the video, it would be one too many
    if settings.get("eta") is not None and settings.get("sampler") is None:
        settings = {**settings, "sampler": "ddim"}  # as the checkpoint's default may be
    params = resolve(prompt, settings, GenerationDefaults())
    check_encoding(params.format, params.fps, crf)
    if input_video is not None:
        if strength is not None:
            check_strength(strength, settings.get("num_inference_steps"))
        read_video(input_video, width=params.width, height=params.height, fps=params.fps, num_frames=1)


def _save(video: Video, destination: Path, crf: int | None) -> None:
    """Write the video, or keep it elsewhere if that fails: it may have taken an hour."""
    try:
        with _cleared_up_when_ended():
            video.save(destination, crf=crf)
    except OutputError as error:
        kept = video.save(Path(tempfile.mkdtemp(prefix="t2v-")) / destination.name, crf=crf)
        raise OutputError(f"{error}. The video is kept as {kept}") from error


def _destination(output: Path | None, format: VideoFormat | None) -> Path:
    """Where the video will go, checked before any work is done for it."""
    if output is None:
        output = Path(f"video.{format or 'mp4'}")
    if not output.name:
        raise OutputError(f"{output}: is a folder; name a file in it, like video.mp4")
    if format is not None and output.suffix.lower().removeprefix(".") not in get_args(VideoFormat):
        output = output.with_name(f"{output.name}.{format}")
    if format not in (None, video_format_of(output)):
        raise InvalidRequest(f"format {format} for {output}: they differ; leave one out", param="format")
    try:
        has_folder, is_folder = output.parent.is_dir(), output.is_dir()
    except OSError as error:  # too long a name, or a folder that is closed to us
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another path") from error
    if not has_folder:
        raise OutputError(f"{output}: there is no folder {output.parent}; create it first")
    if is_folder or not os.access(output.parent, os.W_OK):
        raise OutputError(f"{output}: a file cannot be written there; choose another path")
    return output


def _sides(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    width, _, height = size.lower().partition("x")
    try:
        return int(width), int(height)
    except ValueError as error:
        raise InvalidRequest(f"size {size}: must be like 256x256, width first", param="size") from error


@contextmanager
def errors_explained(console: Console) -> Iterator[None]:
    """A user's mistake is one line and exit code 2, any other known failure 1, Ctrl-C 130. None has a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("Cancelled; nothing was written.")
        raise typer.Exit(_CANCELLED) from None
    except T2VError as error:
        console.print(f"Error: {error}", markup=False, soft_wrap=True, highlight=False)
        raise typer.Exit(2 if isinstance(error, InvalidRequest) else 1) from None


@contextmanager
def _cleared_up_when_ended() -> Iterator[None]:
    """SIGTERM and SIGHUP are exits here, so that what is half-written goes, with the code that shells expect."""
    # under nohup, SIGHUP is ignored, and stays so
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]

    def leave(signum: int, frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # shells and terminals may send several
        sys.exit(128 + signum)

    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _console() -> Console:
    # What is printed holds names and messages that are not ours: none of it is markup.
    return Console(stderr=True, markup=False, emoji=False)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    app()
