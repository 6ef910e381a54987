"""Convolutions that keep the size of an image: a product whose rows are read once for each tap, that many pixels away.

For Hopper GPUs, whose copy engine fetches boxes of pixels, and fills in zeros for those outside of the image. In fp8
for all convolutions, since libraries have none; in half precision for those over time where the library is slower.
"""

import itertools
import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from t2v_core.kernels.fp8 import FP8, scale_of

_BLOCK_M, _BLOCK_N, _NUM_STAGES = 128, 128, 3
_BLOCK_K_BYTES = 128  # a row of the copy engine's boxes; where channels are no multiple of it, half of that
_WIDE = 1280  # channels, of which a program of 8 warps is faster than one of 4
# Where cuDNN is slower over time, in half precision: 61 us against 38 for 2 rows of 640 channels on an H100, 63 against
# 47 of 1280. It is faster with fewer channels, with more values, and with too few pixels to keep a GPU busy with tiles.
_MIN_CHANNELS, _MAX_VALUES, _MIN_PIXELS = 640, 2**23, 2048

Box = tuple[int, int, int]  # images, rows, columns: each a power of two


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is made for such channels and this memory of the weight. x: (..., c), weight: (c2, c, ...)."""
    last = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    return (
        x.dtype == weight.dtype != torch.float32
        and x.shape[-1] % 64 == 0
        and len(weight) % 8 == 0
        and weight.is_contiguous(memory_format=last)
    )


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether it is faster over time than the library, too."""
    channels, values = x.shape[-1], x.numel()
    is_faster = channels >= _MIN_CHANNELS and values <= _MAX_VALUES and values // channels >= _MIN_PIXELS
    return (x.dtype == FP8 or is_faster) and fits(x, weight)


def conv_frames(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """See `plain.conv_frames`."""
    return _conv(x.flatten(0, 1), weight, dtype).unflatten(0, x.shape[:2])


def conv_over_time(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See `plain.conv_over_time`."""
    return _conv(x.flatten(2, 3), weight.squeeze(-1), dtype or x.dtype).unflatten(2, x.shape[2:4])


def _conv(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x: (n, h, w, c), weight: (c2, c, ky, kx), both with channels last in memory -> (n, h, w, c2)."""
    images, height, width, channels = x.shape
    out_channels, _, taps_y, taps_x = weight.shape
    out = x.new_empty(images, height, width, out_channels, dtype=dtype)
    box = _box(images, height, width)
    block_k = _BLOCK_K_BYTES // x.element_size()
    if channels % block_k:
        block_k //= 2
    taps = weight.permute(0, 2, 3, 1).view(out_channels, taps_y * taps_x * channels)  # as they lie in memory
    tiles = [triton.cdiv(size, part) for size, part in zip((images, height, width), box, strict=True)]
    num_n = triton.cdiv(out_channels, _BLOCK_N)
    _conv_tile[(num_n * math.prod(tiles),)](  # the second axis of a grid would be too short for the largest videos
        TensorDescriptor.from_tensor(x.contiguous(), [*box, block_k]),
        TensorDescriptor.from_tensor(taps, [_BLOCK_N, block_k]),
        TensorDescriptor.from_tensor(out, [*box, _BLOCK_N]),
        num_n, tiles[1], tiles[2], channels,
        SCALE=scale_of(weight),
        TAPS_Y=taps_y, TAPS_X=taps_x, BOX_N=box[0], BOX_H=box[1], BOX_W=box[2], BLOCK_N=_BLOCK_N, BLOCK_K=block_k,
        num_warps=8 if channels >= _WIDE else 4, num_stages=_NUM_STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@lru_cache(maxsize=1024)
def _box(images: int, height: int, width: int) -> Box:
    """The box of as many pixels as a program computes that leaves the least of them outside; the widest of those."""
    powers = [2**power for power in range(_BLOCK_M.bit_length())]
    boxes = [(n, h, w) for n, h, w in itertools.product(powers, repeat=3) if n * h * w == _BLOCK_M]

    def computed(box: Box) -> int:
        return math.prod(triton.cdiv(size, part) for size, part in zip((images, height, width), box, strict=True))

    return min(boxes, key=lambda box: (computed(box), -box[2], -box[1]))


@triton.jit
def _conv_tile(
    x, weight, out, num_n, tiles_y, tiles_x, channels,
    SCALE: tl.constexpr,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channel, tile = tl.program_id(0) % num_n * BLOCK_N, tl.program_id(0) // num_n
    image = tile // (tiles_y * tiles_x) * BOX_N
    top, left = tile // tiles_x % tiles_y * BOX_H, tile % tiles_x * BOX_W
    steps_of_tap = channels // BLOCK_K
    total = tl.zeros((BOX_N * BOX_H * BOX_W, BLOCK_N), tl.float32)
    for step in range(TAPS_Y * TAPS_X * steps_of_tap):
        tap = step // steps_of_tap
        y, x_ = top + tap // TAPS_X - TAPS_Y // 2, left + tap % TAPS_X - TAPS_X // 2
        pixels = x.load([image, y, x_, step % steps_of_tap * BLOCK_K]).reshape(BOX_N * BOX_H * BOX_W, BLOCK_K)
        total = tl.dot(pixels, weight.load([channel, step * BLOCK_K]).T, total)
    out.store([image, top, left, channel], (total * SCALE).to(out.dtype).reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))
