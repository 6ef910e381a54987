r"""Convolutions of frames and over time in Gluon beside the library's: where `t2v_core/kernels/gluon_conv.py` pays.

    python load_tests/tune_conv.py

For sizes of the released UNet, with 2, 4 and 16 rows of 16 frames of 256x256, and with 2 rows of 24 frames of 576x320
and of 1024x576: microseconds and TFLOP/s of the library, of Triton's kernel over time, and of Gluon's with pieces of 64
and of 32 columns and with both, and how far their results are from the library's. For a Hopper GPU.
"""

import itertools
import sys
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from bench_gpu import relative_error
from bench_kernels import Timer
from torch import Tensor
from trials import Way

from t2v_core.kernels import gluon_conv, plain, triton_conv

_PIECES = ((64,), (32,), (64, 32))


class Size(NamedTuple):
    """Rows of videos with so many frames of so many pixels, and their channels before and after."""

    rows: int
    frames: int
    height: int
    width: int
    channels: int
    out_channels: int


_OVER_TIME = ((32, 32, 320, 320), (16, 16, 640, 640), (8, 8, 1280, 1280))
_OF_576 = ((40, 72, 320, 320), (20, 36, 640, 640), (10, 18, 1280, 1280), (5, 9, 1280, 1280))
_LARGE = (*_OF_576, (72, 128, 320, 320), (36, 64, 640, 640), (18, 32, 1280, 1280))
_OF_FRAMES = (
    *_OVER_TIME,
    *((32, 32, 640, 320), (32, 32, 960, 320), (16, 16, 320, 640), (16, 16, 960, 640), (16, 16, 1280, 640)),
    *((16, 16, 1920, 640), (8, 8, 640, 1280), (8, 8, 2560, 1280)),
)


def main() -> None:
    timer = Timer(torch.device("cuda"))
    for size in _sizes(_OVER_TIME):
        x, weight = _inputs(size, (3, 1, 1))
        ways: dict[str, Way] = {
            "library": partial(plain.conv_over_time, x, weight),
            "Triton": partial(triton_conv.conv_over_time, x, weight),
        }
        for pieces in _PIECES:
            ways[f"Gluon, pieces of {pieces}"] = partial(gluon_conv.conv_over_time, x, weight, pieces=pieces)
        _compare(f"over time, {size}", timer, x, weight, ways)
    for size in _sizes(_OF_FRAMES):
        x, weight = _inputs(size, (3, 3))
        ways = {"library": partial(plain.conv_frames, x, weight, x.dtype)}
        for pieces in _PIECES:
            ways[f"Gluon, pieces of {pieces}"] = partial(gluon_conv.conv_frames, x, weight, pieces=pieces)
        _compare(f"of frames, {size}", timer, x, weight, ways)


def _sizes(small: tuple[tuple[int, int, int, int], ...]) -> list[Size]:
    return [
        *(Size(rows, 16, *size) for size, rows in itertools.product(small, (2, 4, 16))),
        *(Size(2, 24, *size) for size in _LARGE),
    ]


def _inputs(size: Size, taps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = partial(torch.randn, device="cuda", dtype=torch.float16, generator=generator)
    weight = draw(size.out_channels, size.channels, *taps) / (size.channels * taps[0] * taps[1]) ** 0.5
    memory_format = torch.channels_last if len(taps) == 2 else torch.channels_last_3d
    return draw(*size[:-1]), weight.to(memory_format=memory_format)


def _compare(title: str, timer: Timer, x: Tensor, weight: Tensor, ways: Mapping[str, Way]) -> None:
    sys.stdout.write(f"\n{title}: {'pays' if gluon_conv.pays(x, weight) else 'does not pay'} by what it is told\n")
    exact = ways["library"]()
    flop = 2 * (x.numel() // x.shape[-1]) * weight.numel()
    for name, way in ways.items():
        error, us = relative_error(way(), exact), timer.us(way)
        sys.stdout.write(f"{us:8.1f} us {flop / us / 1e6:4.0f} TFLOP/s  {name}  {error:.1e}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
