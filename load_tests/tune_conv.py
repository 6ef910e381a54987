r"""Convolutions of few tiles by programs that share them evenly: what to set in `t2v_core/kernels/triton_conv.py`.

    python load_tests/tune_conv.py
    TRITON_INTERPRET=1 python load_tests/tune_conv.py --check

A tile of 128 pixels is a sum of up to 180 products. With 160 tiles for 132 processors, most of these wait for
those that have two. Here each program computes as many products as any other, of one tile after the other; the sums of
tiles that several have worked at are added up by a second kernel. For sizes of the released UNet, with 2 and 16 rows of
16 frames of 256x256: microseconds and TFLOP/s of the library, of our kernel as it is, and of each choice.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bench_kernels import Timer
from torch import Tensor
from trials import any_device, check, compare, compile_at_once, only_checked
from triton.tools.tensor_descriptor import TensorDescriptor

from t2v_core.kernels import plain, triton_conv
from t2v_core.kernels.triton_geglu import num_processors

_BLOCK_M, _BLOCK_K = 128, 64
_ADDED_COLUMNS = 32  # of a program that adds up
_FRAMES = 16


class Size(NamedTuple):
    """Of a square image, over time or of each frame."""

    side: int
    channels: int
    out_channels: int
    over_time: bool


class Choice(NamedTuple):
    """Columns of a tile, warps, stages, and programs on a processor."""

    block_n: int
    num_warps: int
    stages: int
    programs: int


_SIZES = (
    Size(32, 320, 320, True),
    Size(16, 640, 640, True),
    Size(8, 1280, 1280, True),
    Size(4, 1280, 1280, True),
    Size(4, 1280, 1280, False),
    Size(4, 2560, 1280, False),
    Size(8, 1280, 1280, False),
    Size(8, 2560, 1280, False),
)
_CHOICES = (
    Choice(128, 8, 3, 1),
    Choice(128, 8, 4, 1),
    Choice(128, 8, 5, 1),
    Choice(128, 4, 3, 2),
    Choice(64, 4, 4, 2),
    Choice(256, 8, 3, 1),
    Choice(256, 8, 4, 1),
)


def main() -> None:
    if only_checked(__doc__):
        _check()
        return
    timer = Timer(torch.device("cuda"))
    compile_at_once(_compile, itertools.product((True, False), _CHOICES))
    for size, num_rows in itertools.product(_SIZES, (2, 16)):
        x, weight = _inputs(size, num_rows, _FRAMES, "cuda")
        flop = 2 * x.numel() * len(weight) * math.prod(weight.shape[2:])
        known = {"library": partial(_library, x, weight), "as it is": partial(triton_conv._conv, x, weight, x.dtype)}
        tried = {str(tuple(choice)): partial(_conv_shared, x, weight, choice) for choice in _CHOICES}
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
        _conv_shared(*_inputs(Size(side, 320, 320, over_time), 2, _FRAMES, "cuda"), choice)


def _check() -> None:
    for size, choice, processors in itertools.product(
        (Size(4, 128, 136, True), Size(5, 64, 264, False)), _CHOICES, (1, 3, 7, 40)
    ):
        x, weight = _inputs(size, 2, 5, any_device())
        exact = _library(x.double(), weight.double())
        found = _conv_shared(x, weight, choice, processors)
        check(f"{size}, {choice}, {processors} processors", found, exact, 1e-3)


def _conv_shared(x: Tensor, weight: Tensor, choice: Choice, processors: int | None = None) -> Tensor:
    """As `triton_conv._conv`."""
    images, height, width, channels = x.shape
    out_channels, _, taps_y, taps_x = weight.shape
    box = triton_conv._box(images, height, width)
    out = x.new_empty(images, height, width, out_channels)
    boxes: Sequence[int] = [triton.cdiv(size, part) for size, part in zip((images, height, width), box, strict=True)]
    num_n = triton.cdiv(out_channels, choice.block_n)
    tiles, steps = num_n * math.prod(boxes), taps_y * taps_x * channels // _BLOCK_K
    share = triton.cdiv(tiles * steps, choice.programs * (processors or num_processors(x.device)))
    programs = triton.cdiv(tiles * steps, share)
    parts = x.new_empty(2 * programs, _BLOCK_M, choice.block_n, dtype=torch.float32)
    taps = {"TAPS_Y": taps_y, "TAPS_X": taps_x, "BLOCK_N": choice.block_n, "BLOCK_K": _BLOCK_K}
    of_box = {"BOX_N": box[0], "BOX_H": box[1], "BOX_W": box[2]}
    _multiply[(programs,)](
        TensorDescriptor.from_tensor(x, [*box, _BLOCK_K]),
        TensorDescriptor.from_tensor(
            weight.permute(0, 2, 3, 1).view(out_channels, steps * _BLOCK_K), [choice.block_n, _BLOCK_K]
        ),
        TensorDescriptor.from_tensor(out, [*box, choice.block_n]),
        parts, tiles, share, num_n, boxes[1], boxes[2], channels,
        **taps, **of_box, num_warps=choice.num_warps, num_stages=choice.stages, enable_fp_fusion=True,
    )  # fmt: skip
    _add_up[(tiles, choice.block_n // _ADDED_COLUMNS)](
        TensorDescriptor.from_tensor(out, [*box, _ADDED_COLUMNS]),
        parts, steps, share, num_n, boxes[1], boxes[2],
        **of_box, BLOCK_N=choice.block_n, COLUMNS=_ADDED_COLUMNS, num_warps=4, enable_fp_fusion=True,
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
def _multiply(
    x, weight, out, parts, tiles, share, num_n, boxes_y, boxes_x, channels,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
):  # fmt: skip
    """Products `share` * program and so on: whole tiles go to `out`, and parts of them to the program's two `parts`."""
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    steps_of_tap = channels // BLOCK_K
    steps = TAPS_Y * TAPS_X * steps_of_tap
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, tiles * steps)
    done = begin
    while done < end:
        tile = done // steps
        last = tl.minimum(end, (tile + 1) * steps)
        image, top, left, channel = _place(tile, num_n, boxes_y, boxes_x, BOX_N, BOX_H, BOX_W, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(done - tile * steps, last - tile * steps):
            tap = step // steps_of_tap
            y, x_ = top + tap // TAPS_X - TAPS_Y // 2, left + tap % TAPS_X - TAPS_X // 2
            pixels = x.load([image, y, x_, step % steps_of_tap * BLOCK_K]).reshape(BLOCK_M, BLOCK_K)
            total = tl.dot(pixels, weight.load([channel, step * BLOCK_K]).T, total)
        if last - done == steps:
            out.store([image, top, left, channel], total.to(out.dtype).reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))
        else:
            part = 2 * tl.program_id(0) + (tile != begin // steps).to(tl.int32)
            at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            tl.store(parts + part * BLOCK_M * BLOCK_N + at, total)
        done = last


@triton.jit
def _add_up(
    out, parts, steps, share, num_n, boxes_y, boxes_x,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of a tile that several programs have worked at."""
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    tile, column = tl.program_id(0), tl.program_id(1) * COLUMNS
    first, last = tile * steps // share, ((tile + 1) * steps - 1) // share
    if first < last:
        at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + column + tl.arange(0, COLUMNS)[None, :]
        total = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        for program in range(first, last + 1):
            part = 2 * program + (tile != program * share // steps).to(tl.int32)
            total += tl.load(parts + part * BLOCK_M * BLOCK_N + at)
        image, top, left, channel = _place(tile, num_n, boxes_y, boxes_x, BOX_N, BOX_H, BOX_W, BLOCK_N)
        out.store([image, top, left, channel + column], total.to(out.dtype).reshape(BOX_N, BOX_H, BOX_W, COLUMNS))


if __name__ == "__main__":
    main()
