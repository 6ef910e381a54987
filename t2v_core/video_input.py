"""Reading an input video of any size, rate and container as frames of one size at one rate.

The bytes come from strangers. FFmpeg sees them through a nameless file object, with the demuxers that follow
names to other files and every protocol switched off, so that no playlist reaches another file or the network.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from t2v_core.errors import InvalidRequest, UnreadableVideo
from t2v_core.truncation import is_cut_off
from t2v_core.upright import upright

# FFmpeg's demuxers that read one self-contained file. Playlists (hls, concat, dash, sdp, image2) stay out.
_DEMUXERS = (
    "mov,matroska,avi,flv,asf,mpegts,mpeg,ogg,ivf,h264,hevc,"  # videos
    "gif,apng,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"  # pictures
)


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """What an input video may cost. A video beyond a limit is an error; max_frames ends the reading."""

    max_bytes: int = 512 * 2**20
    max_pixels: int = 7680 * 4320  # of one frame, as stored
    max_duration_s: float = 600.0
    max_frames: int = 512  # given back
    max_decoded_frames: int = 40_000


class _Input(NamedTuple):
    name: str  # for messages
    container: InputContainer
    cut_off: bool
    limits: VideoLimits


class _Picture(NamedTuple):
    start_s: Fraction  # from the first picture
    end_s: Fraction
    frame: av.VideoFrame


def read_video(
    source: Path | str | bytes,
    *,
    width: int,
    height: int,
    fps: float,
    num_frames: int | None = None,
    limits: VideoLimits = VideoLimits(),
) -> Tensor:
    """The video's frames from its first one on, as (f, height, width, 3) uint8 RGB at `fps`.

    source: a file's path, or its bytes. Each frame is scaled to cover the size and cropped around its
    centre; transparent parts become black. An image is a video of one frame. Without num_frames: all frames,
    at most limits.max_frames of them. Raises UnreadableVideo for a damaged, empty or unknown file, for one
    beyond the limits, and for one that holds fewer than num_frames frames at this rate.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise InvalidRequest(f"fps {fps}: must be above 0", param="fps")
    if num_frames is not None and not 1 <= num_frames <= limits.max_frames:
        raise InvalidRequest(f"num_frames {num_frames}: must be 1 to {limits.max_frames}", param="num_frames")
    frames: list[Tensor] = []
    with _open(source, limits) as video:
        stream = _video_stream(video)
        shown = _resample(_decode(video, stream), Fraction(fps), _slack_s(stream, Fraction(fps)))
        last: av.VideoFrame | None = None
        for frame in islice(shown, num_frames or limits.max_frames):
            # a frame shown twice is converted once
            frames.append(frames[-1] if frame is last else _cover(frame, stream, width, height))
            last = frame
        if not frames:
            raise UnreadableVideo(f"{video.name}: no picture of it can be decoded: encode it again as mp4")
        if num_frames is not None and len(frames) < num_frames:
            raise UnreadableVideo(
                f"{video.name}: it gives {len(frames)} frames at {fps:g} fps and {num_frames} are needed:"
                " ask for fewer frames or send a longer video"
            )
    return torch.stack(frames)


def read_metadata(source: Path | str | bytes) -> dict[str, str]:
    """What `encode_video` was given as metadata; {} for a video made elsewhere. Raises UnreadableVideo."""
    with _open(source, VideoLimits()) as video:
        # Matroska writes the names of tags in capitals
        comment = {key.lower(): value for key, value in video.container.metadata.items()}.get("comment", "")
    try:
        metadata = json.loads(comment)
    except (ValueError, RecursionError):  # not ours, and perhaps hostile
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return {}
    return metadata


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames at another size, anti-aliased. frames: (f, h, w, c) uint8; gives (f, height, width, c)."""
    if frames.shape[1:3] == (height, width):
        return frames
    planes = rearrange(frames, "f h w c -> f c h w")
    resized = functional.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    return rearrange(resized, "f c h w -> f h w c").contiguous()


def cover(frames: Tensor, height: int, width: int, pixel_aspect: float = 1.0) -> Tensor:
    """Frames scaled to cover a size and cropped around their centre. (f, h, w, c) uint8 -> (f, height, width, c).

    pixel_aspect: how much wider than high a pixel is.
    """
    _, h, w, _ = frames.shape
    crop_w = max(1, min(w, round(h * width / height / pixel_aspect)))
    crop_h = max(1, min(h, round(w * height / width * pixel_aspect)))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    return resize(frames[:, top : top + crop_h, left : left + crop_w], height, width)


@contextmanager
def _open(source: Path | str | bytes, limits: VideoLimits) -> Iterator[_Input]:
    """The source, opened by its demuxer. FFmpeg's errors become UnreadableVideo, also inside the block."""
    name = f"video of {len(source)} bytes" if isinstance(source, bytes) else f"video {str(source)!r}"
    try:
        with _file_of(source, name) as file:
            num_bytes = file.seek(0, os.SEEK_END)
            if num_bytes == 0:
                raise UnreadableVideo(f"{name}: it is empty: send the file again")
            if num_bytes > limits.max_bytes:
                raise UnreadableVideo(
                    f"{name}: {num_bytes} bytes are above the limit of {limits.max_bytes}: cut or compress it"
                )
            cut_off = is_cut_off(file)
            with av.open(
                file,
                "r",
                options=_decoder_options(limits),
                container_options={"format_whitelist": _DEMUXERS, "protocol_whitelist": ""},
                metadata_errors="replace",
            ) as container:
                yield _Input(name, container, cut_off, limits)
    except (av.FFmpegError, OSError) as error:
        raise UnreadableVideo(
            f"{name}: it is damaged, not a video of a known kind, or has frames above the limit of"
            f" {limits.max_pixels} pixels ({error.strerror}): check that it plays, encode it again as mp4"
        ) from error


def _file_of(source: Path | str | bytes, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        return BytesIO(source)
    try:
        # a pipe or a device could keep the reader waiting for ever
        if not stat.S_ISREG(Path(source).stat().st_mode):
            raise UnreadableVideo(f"{name}: it is not a regular file: name a video file")
        # opened by its number, because FFmpeg gives a meaning to some names
        return os.fdopen(os.open(source, os.O_RDONLY), "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UnreadableVideo(f"{name}: cannot be opened ({error}): name a readable file") from error


def _decoder_options(limits: VideoLimits) -> dict[str, str]:
    # The decoders' own guard, for sizes that no header tells. They round sides up before they compare.
    return {"max_pixels": str(2 * limits.max_pixels + 2**16)}


def _video_stream(video: _Input) -> VideoStream:
    """The first stream of moving pictures, checked against the limits before anything is decoded."""
    name, container, _, limits = video
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if any(s.disposition & Disposition.dependent for s in streams):
        raise UnreadableVideo(f"{name}: it is a picture in tiles, as phones store HEIC: save it as JPEG or PNG")
    if not streams:
        raise UnreadableVideo(f"{name}: it holds no video stream: send a video, not only sound")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise UnreadableVideo(f"{name}: its codec cannot be decoded here: encode it again as H.264 mp4")
    _check_pixels(context.width, context.height, video)
    duration_s = container.duration / av.time_base if container.duration else 0.0
    if stream.duration:
        duration_s = float(stream.duration * _tick_s(stream))
    if duration_s > limits.max_duration_s:
        raise _too_long(name, duration_s, limits)
    context.options = {**_decoder_options(limits), "err_detect": "crccheck+explode"}
    return stream


def _decode(video: _Input, stream: VideoStream) -> Iterator[_Picture]:
    """Every picture with its time. Times never go back; a picture that is damaged is an error."""
    name, container, cut_off, limits = video
    tick_s = _tick_s(stream)
    usual_s = _usual_s(stream)
    first_s: Fraction | None = None
    start_s = end_s = Fraction(0)
    num_decoded = 0
    try:
        for packet in container.demux(stream):
            frames = packet.decode()
            if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                raise _damaged(name, end_s)
            for frame in frames:
                num_decoded += 1
                _check_pixels(frame.width, frame.height, video)
                if num_decoded > limits.max_decoded_frames:
                    raise UnreadableVideo(
                        f"{name}: it holds more frames than the limit of {limits.max_decoded_frames}: cut it"
                    )
                stamp = frame.pts if frame.pts is not None else frame.dts
                stamp_s = end_s if stamp is None else stamp * tick_s
                first_s = stamp_s if first_s is None else first_s
                start_s = max(start_s, stamp_s - first_s)
                end_s = start_s + (frame.duration * tick_s or usual_s)
                if start_s > limits.max_duration_s:
                    raise _too_long(name, float(start_s), limits)
                yield _Picture(start_s, end_s, frame)
    except av.FFmpegError as error:
        if num_decoded == 0:
            raise  # it may not be a video at all: `_open` says so
        raise _damaged(name, end_s) from error
    if cut_off:
        raise _damaged(name, end_s)


def _resample(pictures: Iterator[_Picture], fps: Fraction, slack_s: Fraction) -> Iterator[av.VideoFrame]:
    """The frame on screen at 0, 1/fps, 2/fps, ... seconds, until the last picture ends."""
    slot = 0
    shown: _Picture | None = None
    num_pictures = 0
    for picture in pictures:
        num_pictures += 1
        while shown is not None and slot / fps + slack_s < picture.start_s:
            yield shown.frame
            slot += 1
        shown = picture
    if shown is None:
        return
    if num_pictures == 1:
        yield shown.frame
        return
    while slot / fps + 2 * slack_s < shown.end_s:  # a start and a duration, both rounded
        yield shown.frame
        slot += 1


def _slack_s(stream: VideoStream, fps: Fraction) -> Fraction:
    """How late a picture may seem because its container rounds times: by half a tick (10 ms in gif).

    Never much of a frame, because a tick as long as a frame, as in avi, rounds nothing.
    """
    return min(_tick_s(stream) / 2, _usual_s(stream) / 4, 1 / fps / 4)


def _usual_s(stream: VideoStream) -> Fraction:
    return 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))


def _tick_s(stream: VideoStream) -> Fraction:
    return stream.time_base or Fraction(1, 1000)


def _check_pixels(width: int, height: int, video: _Input) -> None:
    if width * height > video.limits.max_pixels:
        raise UnreadableVideo(
            f"{video.name}: frames of {width}x{height} are above the limit of {video.limits.max_pixels}"
            " pixels: scale it down"
        )


def _too_long(name: str, duration_s: float, limits: VideoLimits) -> UnreadableVideo:
    return UnreadableVideo(
        f"{name}: {duration_s:.2f} s are above the limit of {limits.max_duration_s:g} s: cut it to length"
    )


def _damaged(name: str, intact_s: Fraction) -> UnreadableVideo:
    return UnreadableVideo(
        f"{name}: it is damaged or cut off after {float(intact_s):.2f} s:"
        " send it again, or ask only for frames before that"
    )


def _cover(frame: av.VideoFrame, stream: VideoStream, width: int, height: int) -> Tensor:
    """The upright frame, scaled to cover the size and cropped around its centre: (height, width, 3)."""
    image, is_transposed = upright(frame)
    pixel_aspect = float(stream.sample_aspect_ratio or 1)
    return cover(image[None], height, width, 1 / pixel_aspect if is_transposed else pixel_aspect)[0]
