"""GroupNorm in three kernels, where no program can hold a group: sums of parts, scales of channels, and one pass.

The sums go from the end to the beginning: what was written last, and what is read next, is still in the cache.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from t2v_core.kernels.triton_instructions import silu
from t2v_core.kernels.triton_rows import load_quarter

_BLOCKS_OF_CHUNKS = (8, 32, 128, 256, 1024)
_FEW_CHUNKS = 32


class _Summing(NamedTuple):
    """How sums are shared out: tiles of so many values, warps of a program, and programs.

    stages: tiles of a program that are on their way at once; of 1, none is before the one before has been added.
    """

    values: int
    warps: int
    programs: int
    stages: int = 1


# On an H200, tiles that are on their way while one is added bring sums of 24 frames of 128x72 and 320 channels from
# 95 us to 70, and of 16 frames of 16x16 and 640 from 6.9 to 6.0. Where two are added and written, in few channels,
# large tiles do: 244 and 215 us of the first.
_SUMMING_FEW, _FEW_VALUES = _Summing(values=1024, warps=1, programs=1056, stages=3), 2**24
_SUMMING_MANY = _Summing(values=4096, warps=2, programs=528, stages=3)
_SUMMING_TWO = _Summing(values=8192, warps=4, programs=2112)
_SUMMING_TWO_WIDE, _WIDE_BLOCK = _Summing(values=1024, warps=1, programs=528, stages=4), 128

_APPLIED_VALUES = 1024  # of a program of the pass
_APPLIED_WARPS_FEW, _APPLIED_WARPS = 1, 2  # 9.6 us instead of 10.0 for few values, 68.8 instead of 68.4 for many

# For which one compiled kernel is as good as another. Of channels, it has to know that they are whole vectors.
SIZES = ("positions", "pixels", "width", "chunk", "chunks", "offset_stride", "offset_share")


def scales_of(
    x: Tensor,
    total: Tensor,
    norm: nn.GroupNorm,
    samples: int,
    *,
    delta: Tensor | None = None,
    skip: Tensor | None = None,
    offset: Tensor | None = None,
    has_quarters: bool = False,
) -> Tensor:
    """What the norm multiplies each channel of each sample by, and what it adds then. (samples, 2, channels), float32.

    Of x, or of x and `skip` beside each other, or of x + `delta`, or of an image of which x has the quarters; `total`,
    (b, f, h, w, c), is x itself or, of the last two, where they are written. offset: (b or 1, c).
    """
    width, x_channels = total.shape[-2:]
    channels = x_channels + (0 if skip is None else skip.shape[-1])
    positions = total.numel() // (samples * x_channels)
    second, added, offset_at, flags = beside(x, delta, skip, offset, samples)
    block_c = block_of_channels(x_channels, channels)
    is_in_total = delta is not None or has_quarters
    summing = _summing_for(samples * positions * channels, block_c, writes=is_in_total)
    block_p = max(1, summing.values // block_c)
    num_c = triton.cdiv(channels, block_c)
    of_sample = max(1, summing.programs // (samples * num_c))
    chunks = min(triton.cdiv(positions, block_p), of_sample, _BLOCKS_OF_CHUNKS[-1])
    chunk = triton.cdiv(triton.cdiv(positions, chunks), block_p) * block_p
    chunks = triton.cdiv(positions, chunk)
    sums = torch.empty(samples, chunks, 2, channels, dtype=torch.float32, device=x.device)
    scales = torch.empty(samples, 2, channels, dtype=torch.float32, device=x.device)
    _sums[(num_c, chunks, samples)](
        x, second, added, total, sums, positions, x_channels, channels, width, chunk, chunks, *offset_at,
        **flags, HAS_QUARTERS=has_quarters, BLOCK_P=block_p, BLOCK_C=block_c, STAGES=summing.stages,
        num_warps=summing.warps, enable_fp_fusion=True,
    )  # fmt: skip
    group_channels = channels // norm.num_groups
    block_n = next(block_n for block_n in _BLOCKS_OF_CHUNKS if block_n >= chunks)
    _scales[(samples, norm.num_groups)](
        sums, added, norm.weight, norm.bias, scales, positions, channels, group_channels, norm.eps, chunks, *offset_at,
        HAS_OFFSET=offset is not None and not is_in_total, BLOCK_G=triton.next_power_of_2(group_channels),
        BLOCK_N=block_n,
        num_warps=2 if block_n <= _FEW_CHUNKS else 8, enable_fp_fusion=True,
    )  # fmt: skip
    return scales


def _summing_for(values: int, block_c: int, *, writes: bool) -> _Summing:
    if values <= _FEW_VALUES:
        return _SUMMING_FEW
    if not writes:
        return _SUMMING_MANY
    return _SUMMING_TWO_WIDE if block_c >= _WIDE_BLOCK else _SUMMING_TWO


def apply_scales(x: Tensor, skip: Tensor | None, scales: Tensor, out: Tensor, *, silu: bool) -> None:
    """Write to `out` what comes of x, or of x and `skip` beside each other, and its SiLU. scales: see `scales_of`."""
    x_channels, channels = x.shape[-1], out.shape[-1]
    positions = out.numel() // (len(scales) * channels)
    block_c = block_of_channels(x_channels, channels)
    block_p = max(1, _APPLIED_VALUES // block_c)
    _apply[(triton.cdiv(channels, block_c) * triton.cdiv(positions, block_p), len(scales))](
        x, x if skip is None else skip, scales, out, positions, x_channels, channels,
        HAS_SKIP=skip is not None, SILU=silu, BLOCK_P=block_p, BLOCK_C=block_c,
        num_warps=_APPLIED_WARPS_FEW if out.numel() <= _FEW_VALUES else _APPLIED_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def beside(
    x: Tensor, delta: Tensor | None, skip: Tensor | None, offset: Tensor | None, samples: int
) -> tuple[Tensor, Tensor, tuple[int, int], dict[str, bool]]:
    """What kernels take beside x: a second input, offsets, their stride and how many samples share one, and flags.

    x stands for what there is none of. An offset of one row is that of all samples; else each belongs to a video's.
    """
    second = next((tensor.contiguous() for tensor in (skip, delta) if tensor is not None), x)
    flags = {"HAS_SKIP": skip is not None, "HAS_DELTA": delta is not None, "HAS_OFFSET": offset is not None}
    if offset is None:
        return second, x, (0, samples), flags
    return second, offset, (0 if len(offset) == 1 else offset.stride(0), samples // len(offset)), flags


def block_of_channels(x_channels: int, channels: int) -> int:
    """A power of two that divides both inputs' channels, so that no program has idle threads or reads both inputs."""
    divisor = math.gcd(math.gcd(x_channels, channels), 256)
    return divisor if divisor >= 32 else triton.next_power_of_2(channels)


@triton.jit
def load(x, second, rows, columns, mask, x_channels, channels, HAS_SKIP: tl.constexpr, HAS_DELTA: tl.constexpr):
    """Values of x, plus those of the second input, or with them in the channels after its own, as float32."""
    rows = rows.to(tl.int64)
    if HAS_DELTA:
        delta = tl.load(second + rows * channels + columns, mask=mask, other=0.0).to(tl.float32)
        return delta + tl.load(x + rows * channels + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_SKIP:
        skip_channels = channels - x_channels
        ours = tl.load(x + rows * x_channels + columns, mask=mask & (columns < x_channels), other=0.0)
        theirs = tl.load(
            second + rows * skip_channels + (columns - x_channels), mask=mask & (columns >= x_channels), other=0.0
        )
        return ours.to(tl.float32) + theirs.to(tl.float32)
    return tl.load(x + rows * channels + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _sums(
    x, second, offset, summed, sums, positions, x_channels, channels, width, chunk, chunks, offset_stride,
    offset_share,
    HAS_SKIP: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_QUARTERS: tl.constexpr, HAS_OFFSET: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums and sums of squares of each channel over the positions of a chunk."""
    part, sample = chunks - 1 - tl.program_id(1), tl.num_programs(2) - 1 - tl.program_id(2)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_channel = channel < channels
    WRITES: tl.constexpr = HAS_DELTA or HAS_QUARTERS
    if HAS_OFFSET:
        where = offset + (sample // offset_share) * offset_stride + channel
        added = tl.load(where, mask=is_channel, other=0.0).to(tl.float32)
    for start in tl.range(0, chunk, BLOCK_P, num_stages=STAGES):
        position = part * chunk + start + tl.arange(0, BLOCK_P)[:, None]
        mask = (position < positions) & (column < channels)
        row = sample * positions + position
        if HAS_QUARTERS:
            values = load_quarter(x, sample, position, column, mask, positions // width, width, channels)
        else:
            values = load(x, second, row, column, mask, x_channels, channels, HAS_SKIP, HAS_DELTA)
        if WRITES:
            if HAS_OFFSET:
                values = tl.where(mask, values + added[None, :], 0.0)
            tl.store(summed + row.to(tl.int64) * channels + column, values.to(summed.dtype.element_ty), mask=mask)
        total += values
        squares += values * values
    sum_of_values, sum_of_squares = tl.sum(total, 0), tl.sum(squares, 0)
    if HAS_OFFSET and not WRITES:  # the sums of x + added, by those of x
        number = tl.minimum(chunk, positions - part * chunk)
        sum_of_squares += added * (2.0 * sum_of_values + number * added)
        sum_of_values += number * added
    where = sums + (sample * chunks + part) * 2 * channels + channel
    tl.store(where, sum_of_values, mask=is_channel)
    tl.store(where + channels, sum_of_squares, mask=is_channel)


@triton.jit(do_not_specialize=(*SIZES, "channels", "group_channels"))
def _scales(
    sums, offset, weight, bias, scales, positions, channels, group_channels, eps, chunks, offset_stride, offset_share,
    HAS_OFFSET: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What each channel is multiplied by, and what is added then."""
    sample, group = tl.program_id(0), tl.program_id(1)
    in_group = tl.arange(0, BLOCK_G)
    is_channel = in_group < group_channels
    column = group * group_channels + in_group
    part = tl.arange(0, BLOCK_N)[:, None]
    where = sums + (sample * chunks + part) * 2 * channels + column[None, :]
    mask = (part < chunks) & is_channel[None, :]
    # All that is read is asked for before the first sum, behind which nothing would be.
    values, squares = tl.load(where, mask=mask, other=0.0), tl.load(where + channels, mask=mask, other=0.0)
    gamma = tl.load(weight + column, mask=is_channel, other=0.0).to(tl.float32)
    beta = tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        added = tl.load(offset + (sample // offset_share) * offset_stride + column, mask=is_channel, other=0.0)
    count = positions * group_channels
    mean = tl.sum(values) / count
    variance = tl.sum(squares) / count - mean * mean
    scale = tl.rsqrt(tl.maximum(variance, 0.0) + eps) * gamma
    shift = beta - mean * scale
    if HAS_OFFSET:
        shift += added.to(tl.float32) * scale
    tl.store(scales + sample * 2 * channels + column, scale, mask=is_channel)
    tl.store(scales + sample * 2 * channels + channels + column, shift, mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def _apply(
    x, second, scales, out, positions, x_channels, channels,
    HAS_SKIP: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_c = tl.cdiv(channels, BLOCK_C)
    block, sample = tl.program_id(0), tl.program_id(1)
    column = block % num_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    scale = tl.load(scales + sample * 2 * channels + column, mask=column < channels, other=0.0)
    shift = tl.load(scales + sample * 2 * channels + channels + column, mask=column < channels, other=0.0)
    position = block // num_c * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    mask = (position < positions) & (column < channels)
    row = sample * positions + position
    y = load(x, second, row, column, mask, x_channels, channels, HAS_SKIP, False) * scale + shift
    if SILU:
        y = silu(y)
    tl.store(out + row.to(tl.int64) * channels + column, y.to(out.dtype.element_ty), mask=mask)
