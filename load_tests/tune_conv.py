r"""Convolutions of few tiles whose sums are shared out: what to set in `t2v_core/kernels/triton_conv.py`.

    python load_tests/tune_conv.py
    TRITON_INTERPRET=1 python load_tests/tune_conv.py --check

A tile of 128 pixels and channels is a sum of up to 360 products, and for 2 rows of 4x4 pixels there are 40 tiles for
132 processors. Here several programs share a tile's sum, and a second kernel adds up theirs. For sizes of the released
UNet, with 2, 4 and 16 rows of 16 frames of 256x256: microseconds and TFLOP/s of the library, of our kernel as it is,
and of each choice, the quickest first. One that does not fit into a processor is left out.
"""

import argparse
import itertools
import math
import sys
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bench_gpu import relative_error
from bench_kernels import Timer
from torch import Tensor
from trials import compare, compile_at_once
from triton.tools.tensor_descriptor import TensorDescriptor

from t2v_core.kernels import plain, triton_conv

_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 128, 64
_ADDED_COLUMNS = 32  # of a program that adds up
_FRAMES = 16


class Size(NamedTuple):
    """Of a square image, over time or of each frame."""

    side: int
    channels: int
    out_channels: int
    over_time: bool


class Choice(NamedTuple):
    """Programs that share a tile, and warps and stages of each."""

    splits: int
    num_warps: int
    num_stages: int


_SIZES = (
    Size(16, 640, 640, True),
    Size(8, 1280, 1280, True),
    Size(4, 1280, 1280, True),
    Size(4, 1280, 1280, False),
    Size(4, 2560, 1280, False),
    Size(8, 640, 1280, False),
    Size(8, 1280, 1280, False),
    Size(8, 1920, 1280, False),
    Size(8, 2560, 1280, False),
    Size(16, 640, 640, False),
)
_CHOICES = tuple(Choice(*choice) for choice in itertools.product((1, 2, 3, 4, 6, 9), (4, 8), (3, 4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only that small ones are right, on any device")
    if parser.parse_args().check:
        _check()
        return
    timer = Timer(torch.device("cuda"))
    compile_at_once(_compile, itertools.product((True, False), _CHOICES))
    for size, num_rows in itertools.product(_SIZES, (2, 4, 16)):
        x, weight = _inputs(size, num_rows, _FRAMES, "cuda")
        flop = 2 * x.numel() * len(weight) * math.prod(weight.shape[2:])
        known = {"library": partial(_library, x, weight), "as it is": partial(triton_conv._conv, x, weight, x.dtype)}
        tried = {str(tuple(choice)): partial(_conv_in_parts, x, weight, choice) for choice in _CHOICES}
        compare(f"{size}, {num_rows} rows", timer, known, tried, flop)


def _library(x: Tensor, weight: Tensor) -> Tensor:
    """As the network calls it."""
    if weight.shape[-1] == 3:
        return plain.conv_frames(x[None], weight, x.dtype)[0]
    return plain.conv_over_time(x.unflatten(2, (x.shape[2], 1)), weight[..., None]).flatten(2, 3)


def _inputs(size: Size, num_rows: int, num_frames: int, device: str) -> tuple[Tensor, Tensor]:
    """As `triton_conv._conv` takes them: (rows, frames, pixels, c) over time, or else (images, h, w, c)."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_rows, num_frames, size.side**2) if size.over_time else (num_rows * num_frames, size.side, size.side)
    taps = (3, 1) if size.over_time else (3, 3)
    x = torch.randn(*shape, size.channels, device=device, dtype=torch.float16, generator=generator)
    weight = torch.randn(
        size.out_channels, size.channels, *taps, device=device, dtype=torch.float16, generator=generator
    )
    return x, (weight / 60).to(memory_format=torch.channels_last)


def _compile(over_time: bool, choice: Choice) -> None:
    """For Triton's cache on disk, where other channels find it as well."""
    for side in {size.side for size in _SIZES if size.over_time == over_time}:
        _conv_in_parts(*_inputs(Size(side, 320, 320, over_time), 2, _FRAMES, "cuda"), choice)


def _check() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size, choice in itertools.product((Size(4, 128, 136, True), Size(5, 64, 264, False)), _CHOICES):
        x, weight = _inputs(size, 2, 5, device)
        error = relative_error(_conv_in_parts(x, weight, choice), _library(x.double(), weight.double()))
        sys.stdout.write(f"{size}, {choice}: {error:.1e}\n")
        assert error < 1e-3


def _conv_in_parts(x: Tensor, weight: Tensor, choice: Choice) -> Tensor:
    """As `triton_conv._conv`."""
    images, height, width, channels = x.shape
    out_channels, _, taps_y, taps_x = weight.shape
    box = triton_conv._box(images, height, width)
    out = x.new_empty(images, height, width, out_channels)
    boxes = [triton.cdiv(size, part) for size, part in zip((images, height, width), box, strict=True)]
    num_n = triton.cdiv(out_channels, _BLOCK_N)
    tiles = num_n * math.prod(boxes)
    parts = out if choice.splits == 1 else x.new_empty(choice.splits, tiles, _BLOCK_M, _BLOCK_N, dtype=torch.float32)
    taps = weight.permute(0, 2, 3, 1).view(out_channels, taps_y * taps_x * channels)
    of_box = {"BOX_N": box[0], "BOX_H": box[1], "BOX_W": box[2]}
    _part_of_tile[(choice.splits * tiles,)](
        TensorDescriptor.from_tensor(x, [*box, _BLOCK_K]),
        TensorDescriptor.from_tensor(taps, [_BLOCK_N, _BLOCK_K]),
        TensorDescriptor.from_tensor(out, [*box, _BLOCK_N]),
        parts, tiles, num_n, boxes[1], boxes[2], channels,
        SPLITS=choice.splits, TAPS_Y=taps_y, TAPS_X=taps_x, **of_box, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
        num_warps=choice.num_warps, num_stages=choice.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if choice.splits > 1:
        _add_parts[(tiles, _BLOCK_N // _ADDED_COLUMNS)](
            TensorDescriptor.from_tensor(out, [*box, _ADDED_COLUMNS]), parts, tiles, num_n, boxes[1], boxes[2],
            SPLITS=choice.splits, **of_box, BLOCK_N=_BLOCK_N, COLUMNS=_ADDED_COLUMNS,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@triton.jit
def _place(
    tile, num_n, boxes_y, boxes_x,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first image, row, column and channel of a tile."""
    box = tile // num_n
    image, top, left = box // (boxes_y * boxes_x) * BOX_N, box // boxes_x % boxes_y * BOX_H, box % boxes_x * BOX_W
    return image, top, left, tile % num_n * BLOCK_N


@triton.jit
def _part_of_tile(
    x, weight, out, parts, tiles, num_n, boxes_y, boxes_x, channels,
    SPLITS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some of a tile's products."""
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    image, top, left, channel = _place(tile, num_n, boxes_y, boxes_x, BOX_N, BOX_H, BOX_W, BLOCK_N)
    steps_of_tap = channels // BLOCK_K
    steps = TAPS_Y * TAPS_X * steps_of_tap
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * steps // SPLITS, (split + 1) * steps // SPLITS):
        tap = step // steps_of_tap
        y, x_ = top + tap // TAPS_X - TAPS_Y // 2, left + tap % TAPS_X - TAPS_X // 2
        pixels = x.load([image, y, x_, step % steps_of_tap * BLOCK_K]).reshape(BLOCK_M, BLOCK_K)
        total = tl.dot(pixels, weight.load([channel, step * BLOCK_K]).T, total)
    if SPLITS == 1:
        out.store([image, top, left, channel], total.to(out.dtype).reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))
    else:
        at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(parts + tl.program_id(0).to(tl.int64) * (BLOCK_M * BLOCK_N) + at, total)


@triton.jit
def _add_parts(
    out, parts, tiles, num_n, boxes_y, boxes_x,
    SPLITS: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of a tile."""
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    tile, column = tl.program_id(0), tl.program_id(1) * COLUMNS
    at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + column + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * tiles + tile).to(tl.int64) * (BLOCK_M * BLOCK_N) + at)
    image, top, left, channel = _place(tile, num_n, boxes_y, boxes_x, BOX_N, BOX_H, BOX_W, BLOCK_N)
    out.store([image, top, left, channel + column], total.to(out.dtype).reshape(BOX_N, BOX_H, BOX_W, COLUMNS))


if __name__ == "__main__":
    main()
