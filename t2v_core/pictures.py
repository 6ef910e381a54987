"""Single pictures of a video: a thumbnail, and a sheet of all its frames. Frames are uint8 RGB (f, h, w, 3)."""

import math
from fractions import Fraction
from typing import Literal

import av
import torch
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange
from torch import Tensor

from t2v_core.errors import InvalidRequest
from t2v_core.media import EXACT, av_frames, check_frames
from t2v_core.video_input import resize

ImageFormat = Literal["jpeg", "png", "webp"]

_MAX_SIDE: dict[ImageFormat, int] = {"webp": 16383, "jpeg": 65535, "png": 65535}


def encode_thumbnail(frames: Tensor, *, format: ImageFormat = "webp", max_side: int = 512) -> bytes:
    """The middle frame as a picture whose longer side is at most max_side pixels. Never enlarged."""
    check_frames(frames)
    num_frames, h, w, _ = frames.shape
    scale = min(1.0, max_side / max(h, w))
    middle = frames[num_frames // 2 : num_frames // 2 + 1].cpu()
    return _encode_image(resize(middle, _scaled(h, scale), _scaled(w, scale))[0], format)


def encode_spritesheet(
    frames: Tensor,
    *,
    format: ImageFormat = "webp",
    columns: int | None = None,
    max_frames: int = 64,
    max_side: int = 192,
) -> bytes:
    """The frames in a grid, row by row, each with a longer side of at most max_side pixels.

    More than max_frames frames: that many of them, spread evenly from the first to the last. columns: near
    to a square grid when None. Frames shrink further where the sheet would be larger than the format allows.
    """
    check_frames(frames)
    for name, value in [("columns", columns), ("max_frames", max_frames), ("max_side", max_side)]:
        if value is not None and value < 1:
            raise InvalidRequest(f"{name} {value}: must be at least 1", param=name)
    num_tiles = min(len(frames), max_frames)
    columns = min(columns or math.ceil(math.sqrt(num_tiles)), num_tiles)
    rows = math.ceil(num_tiles / columns)
    _, h, w, _ = frames.shape
    limit = _MAX_SIDE[format]
    scale = min(1.0, max_side / max(h, w), limit / (columns * w), limit / (rows * h))
    picked = torch.linspace(0, len(frames) - 1, num_tiles).round().long()
    tiles = resize(frames[picked].cpu(), _scaled(h, scale), _scaled(w, scale))
    blank = tiles.new_zeros(rows * columns - num_tiles, *tiles.shape[1:])
    sheet = rearrange(torch.cat([tiles, blank]), "(row col) h w c -> (row h) (col w) c", row=rows)
    return _encode_image(sheet, format)


def _scaled(side: int, scale: float) -> int:
    return max(1, int(side * scale))


def _encode_image(image: Tensor, format: ImageFormat) -> bytes:
    """image: (h, w, 3) uint8."""
    h, w, _ = image.shape
    picture = next(av_frames(image[None], fps=1))
    if format == "webp":
        context = av.VideoCodecContext.create("libwebp", "w")
        context.options = {"quality": "90", "compression_level": "0"}  # a third of the time of 4, and as small
        context.pix_fmt = "bgra"
    elif format == "png":
        context = av.VideoCodecContext.create("png", "w")
        context.pix_fmt = "rgb24"
    else:
        context = av.VideoCodecContext.create("mjpeg", "w")
        context.qmin = context.qmax = 2
        context.pix_fmt = "yuvj420p"
        context.color_range = ColorRange.JPEG
        # JFIF knows this matrix only
        picture = picture.reformat(
            format="yuvj420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.JPEG,
            interpolation=EXACT,
            threads=1,
        )
    context.width, context.height = w, h
    context.time_base = Fraction(1, 1)
    context.thread_count = 1
    packets = context.encode(picture) + context.encode(None)
    return b"".join(bytes(packet) for packet in packets)
