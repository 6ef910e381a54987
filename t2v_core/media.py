"""Writing frames to video files. Frames are uint8 RGB tensors (f, h, w, 3) on any device."""

import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Literal

import av
import torch
from av.codec.context import ThreadType
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from torch import Tensor

from t2v_core.errors import InvalidRequest, OutputError

VideoFormat = Literal["mp4", "webm", "gif"]

_MAX_EXACT_COLOURS = 4_096
_MAX_GIF_FPS = 50  # browsers slow a frame of less than 20 ms down to 100 ms

# The number of threads changes what x264 writes, so it is a constant and not the number of cores.
_ENCODER_THREADS = 4

# BITEXACT keeps swscale off code that differs between processors, FULL_CHR_H_INP off a crude chroma average.
_ROUNDING = Interpolation.ACCURATE_RND | Interpolation.BITEXACT
EXACT = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | _ROUNDING


@dataclass(frozen=True, slots=True)
class _Codec:
    name: str
    pix_fmt: str
    crf_range: range  # empty where the codec has no such setting
    default_crf: int | None
    options: Mapping[str, str]
    muxer_options: Mapping[str, str]


_CODECS: Mapping[VideoFormat, _Codec] = {
    "mp4": _Codec(
        name="libx264",
        pix_fmt="yuv420p",
        crf_range=range(1, 52),  # 0 is lossless H.264, which is outside the High profile: browsers refuse it
        default_crf=10,
        options={"preset": "veryfast", "x264-params": "cpu-independent=1"},  # a quarter less time than faster, as small
        muxer_options={"movflags": "+faststart"},
    ),
    "webm": _Codec(
        name="libvpx-vp9",
        pix_fmt="yuv420p",
        crf_range=range(64),
        default_crf=20,
        options={"deadline": "good", "cpu-used": "4"},
        muxer_options={},
    ),
    "gif": _Codec(
        name="gif",
        pix_fmt="pal8",
        crf_range=range(0),
        default_crf=None,
        options={},
        muxer_options={"loop": "0"},
    ),
}


def video_format_of(path: Path | str) -> VideoFormat:
    """The format that a file name's suffix asks for. Raises InvalidRequest for any other suffix."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    for video_format in _CODECS:
        if suffix == video_format:
            return video_format
    allowed = ", ".join(f".{video_format}" for video_format in _CODECS)
    raise InvalidRequest(
        f"file name {str(path)!r}: the suffix must be one of {allowed}; rename it",
        param="format",
    )


def check_encoding(format: VideoFormat, fps: int, crf: int | None) -> None:
    """What `encode_video` checks of these, before there are frames. Raises InvalidRequest."""
    if fps < 1:
        raise InvalidRequest(f"fps {fps}: must be at least 1", param="fps")
    if format == "gif" and fps > _MAX_GIF_FPS:
        raise InvalidRequest(
            f"fps {fps}: a gif plays at most {_MAX_GIF_FPS}: lower it, or choose mp4 or webm", param="fps"
        )
    if format == "gif" and crf is not None:
        raise InvalidRequest(f"crf {crf}: a gif has none: leave it out, or choose mp4 or webm", param="crf")
    codec = _CODECS[format]
    if crf is not None and crf not in codec.crf_range:
        raise InvalidRequest(
            f"crf {crf}: {format} takes {codec.crf_range[0]} (best) to {codec.crf_range[-1]} (smallest),"
            f" and {codec.default_crf} when it is left out",
            param="crf",
        )


def encode_video(
    frames: Tensor,
    *,
    fps: int,
    format: VideoFormat = "mp4",
    crf: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """A playable file: H.264 in mp4, VP9 in webm (both yuv420p, BT.709, limited range) or a looping gif.

    frames: (f, h, w, 3) uint8 RGB with even sides. crf: 1 to 51 for mp4, 0 to 63 for webm, less is better.
    The same arguments give the same bytes on any number of cores. `read_metadata` gives `metadata` back.
    Raises InvalidRequest for a crf out of range, a crf with gif, or a gif above 50 fps.
    """
    check_frames(frames)
    codec = _CODECS[format]
    options = {"flags": "+bitexact", **codec.options}
    quality = codec.default_crf if crf is None else crf
    check_encoding(format, fps, quality)
    if quality is not None:
        options["crf"] = str(quality)
    # Under one key that all players know, as JSON: WebM folds the case of keys, and all end a value at a NUL.
    comment = json.dumps(dict(metadata)) if metadata else None
    buffer = BytesIO()

    def read_back(url: str, flags: int, options: dict[str, str]) -> BytesIO:
        """What was written so far: +faststart opens it, to move it behind the index."""
        return BytesIO(buffer.getvalue())

    # bitexact: no random ids, no times and no version numbers in the file
    muxer_options = {"fflags": "+bitexact", **codec.muxer_options}
    with av.open(buffer, "w", format=format, container_options=muxer_options, io_open=read_back) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream(codec.name, rate=fps, options=options)
        context = stream.codec_context
        assert isinstance(context, VideoCodecContext)
        _, context.height, context.width, _ = frames.shape
        context.pix_fmt = codec.pix_fmt
        context.thread_count, context.thread_type = _ENCODER_THREADS, ThreadType.FRAME
        if format != "gif":
            context.colorspace = Colorspace.ITU709
            context.color_range = ColorRange.MPEG
            context.color_primaries = ColorPrimaries.BT709
            context.color_trc = ColorTrc.BT709
        for picture in _with_one_palette(frames, fps) if format == "gif" else _yuv420p(frames, fps):
            container.mux(context.encode(picture))
        container.mux(context.encode(None))
    data = buffer.getvalue()
    return _with_gif_comment(data, comment) if format == "gif" and comment is not None else data


def save_video(
    frames: Tensor,
    path: Path | str,
    *,
    fps: int,
    format: VideoFormat | None = None,
    crf: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write what `encode_video` gives to `path`, whole or not at all. format: from the suffix when None.

    Raises OutputError when the file cannot be written; a file that was there before then stays as it was.
    """
    path = Path(path)
    data = encode_video(frames, fps=fps, format=format or video_format_of(path), crf=crf, metadata=metadata)
    # In the same folder, because a rename is only atomic within one file system.
    temporary = path.parent / f".t2v-{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {str(path)!r}: {error.strerror}: {_remedy(error)}") from error
        raise
    return path


def check_frames(frames: Tensor) -> None:
    """Raise ValueError for what is no video of this package: a mistake in the code, not in a request."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"frames {frames.dtype} {tuple(frames.shape)}: must be uint8 (f, h, w, 3)")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames of {frames.shape[2]}x{frames.shape[1]}: both sides must be even")


def av_frames(frames: Tensor, fps: int) -> Iterator[av.VideoFrame]:
    """The frames as PyAV's, timed."""
    for index, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(frame.contiguous().cpu().numpy(), format="rgb24")
        picture.pts, picture.time_base, picture.duration = index, Fraction(1, fps), 1
        yield picture


def _yuv420p(frames: Tensor, fps: int) -> Iterator[av.VideoFrame]:
    for picture in av_frames(frames, fps):
        yield picture.reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=EXACT,
            threads=1,
        )


def _with_one_palette(frames: Tensor, fps: int) -> Iterator[av.VideoFrame]:
    """The frames in at most 256 colours, chosen over the whole video so that they do not flicker."""
    graph = Graph()
    graph.threads = 1
    _, h, w, _ = frames.shape
    source = graph.add_buffer(width=w, height=h, format=av.VideoFormat("rgb24"), time_base=Fraction(1, fps))
    split = graph.add("split")
    # palettegen slows down with the number of distinct colours: 24 frames of 1024x576 took 31 s, and 6 s when rounded.
    # Where they are few they stay exact, or dithering would sprinkle flat areas with dots.
    r, g, b = frames.int().flatten(0, 2).unbind(-1)
    num_colours = len(torch.unique(r << 16 | g << 8 | b))
    coarse = "bitor(bitand(val,252),val/64)" if num_colours > _MAX_EXACT_COLOURS else "val"
    round_colours = graph.add("lutrgb", r=coarse, g=coarse, b=coarse)
    palette = graph.add("palettegen")
    use_palette = graph.add("paletteuse", "dither=sierra2_4a:diff_mode=rectangle")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use_palette)
    split.link_to(round_colours, output_idx=1)
    round_colours.link_to(palette)
    palette.link_to(use_palette, input_idx=1)
    use_palette.link_to(sink)
    graph.configure()
    for picture in av_frames(frames, fps):
        source.push(picture)
    source.push(None)
    for _ in frames:
        yield graph.vpull()


def _with_gif_comment(data: bytes, comment: str) -> bytes:
    """The gif with a comment extension (GIF89a, section 24), which FFmpeg's muxer does not write."""
    text = comment.encode("ascii")
    blocks = b"".join(bytes([len(text[i : i + 255])]) + text[i : i + 255] for i in range(0, len(text), 255))
    assert data.endswith(b"\x3b")
    return data[:-1] + b"\x21\xfe" + blocks + b"\x00\x3b"


def _remedy(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "create the folder first"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space or choose another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder that you may write to"
    return "choose another path"
