"""GroupNorm and SiLU over channels-last frames, with what comes before it: an added offset, or a second input.

A group of few values is normalised by one program, which reads it once. Else there are three kernels: sums of parts,
the scale and shift of every channel, and one pass that applies them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_WHOLE_GROUP_VALUES = 16384  # that one program holds in registers
_WHOLE_GROUP_CHANNELS = 30  # fewer beside each other in memory are read too slowly by groups
_TILE_VALUES = 4096
_PROGRAMS = 528  # four for each processor of an H100


def group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    *,
    over_frames: bool,
    silu: bool,
    offset: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """See `plain.group_norm`."""
    b, f, h, w, x_channels = x.shape
    samples, positions = (b, f * h * w) if over_frames else (b * f, h * w)
    channels = x_channels + (0 if skip is None else skip.shape[-1])
    group_channels = channels // norm.num_groups
    out = x.new_empty(b, f, h, w, channels)
    x = x.contiguous()
    second = x if skip is None else skip.contiguous()
    added = norm.weight if offset is None else offset
    shape = (positions, x_channels, channels, norm.num_groups, norm.eps)
    flags = {
        "HAS_SKIP": skip is not None,
        "HAS_OFFSET": offset is not None,
        "SILU": silu,
        "GROUP_CHANNELS": group_channels,
        "BLOCK_G": triton.next_power_of_2(group_channels),
    }
    # An offset of one row is that of all samples; over_frames says how many samples share one else.
    offset_stride = 0 if offset is None or len(offset) == 1 else offset.stride(0)
    offset_share = samples // b
    whole = triton.next_power_of_2(positions) * flags["BLOCK_G"]
    if whole <= _WHOLE_GROUP_VALUES and group_channels >= _WHOLE_GROUP_CHANNELS:
        _whole_groups[(samples, norm.num_groups)](
            x, second, added, norm.weight, norm.bias, out, *shape, offset_stride, offset_share,
            **flags,
            BLOCK_P=triton.next_power_of_2(positions),
            num_warps=2 if whole <= 1024 else 4 if whole <= 4096 else 8,
        )  # fmt: skip
        return out

    block_c = triton.next_power_of_2(channels)
    block_p = max(1, _TILE_VALUES // block_c)
    chunks = min(triton.cdiv(positions, block_p), max(1, _PROGRAMS // samples), 128)
    chunk = triton.cdiv(triton.cdiv(positions, chunks), block_p) * block_p
    chunks = triton.cdiv(positions, chunk)
    sums = torch.empty(samples, chunks, 2, channels, dtype=torch.float32, device=x.device)
    scales = torch.empty(samples, 2, channels, dtype=torch.float32, device=x.device)
    inputs = (x, second, added)
    _sums[(samples, chunks)](
        *inputs, sums, positions, x_channels, channels, chunk, chunks, offset_stride, offset_share,
        HAS_SKIP=flags["HAS_SKIP"], HAS_OFFSET=flags["HAS_OFFSET"], BLOCK_P=block_p, BLOCK_C=block_c,
        num_warps=8,
    )  # fmt: skip
    _scales[(samples, norm.num_groups)](
        sums, added, norm.weight, norm.bias, scales, *shape, chunks, offset_stride, offset_share,
        HAS_OFFSET=flags["HAS_OFFSET"], GROUP_CHANNELS=group_channels, BLOCK_G=flags["BLOCK_G"],
        BLOCK_N=triton.next_power_of_2(chunks),
        num_warps=2,
    )  # fmt: skip
    _apply[(samples, triton.cdiv(positions, block_p))](
        x, second, scales, out, positions, x_channels, channels,
        HAS_SKIP=flags["HAS_SKIP"], SILU=silu, BLOCK_P=block_p, BLOCK_C=block_c,
        num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _load(x, skip, rows, columns, mask, x_channels, channels, HAS_SKIP: tl.constexpr):
    """Values of x and, in the channels after its own, of the skip connection, as float32."""
    rows = rows.to(tl.int64)
    if HAS_SKIP:
        skip_channels = channels - x_channels
        ours = tl.load(x + rows * x_channels + columns, mask=mask & (columns < x_channels), other=0.0)
        theirs = tl.load(
            skip + rows * skip_channels + (columns - x_channels), mask=mask & (columns >= x_channels), other=0.0
        )
        return ours.to(tl.float32) + theirs.to(tl.float32)
    return tl.load(x + rows * channels + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _whole_groups(
    x, skip, offset, weight, bias, out, positions, x_channels, channels, num_groups, eps, offset_stride, offset_share,
    HAS_SKIP: tl.constexpr, HAS_OFFSET: tl.constexpr, SILU: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    sample, group = tl.program_id(0), tl.program_id(1)
    position = tl.arange(0, BLOCK_P)[:, None]
    in_group = tl.arange(0, BLOCK_G)[None, :]
    column = group * GROUP_CHANNELS + in_group
    mask = (position < positions) & (in_group < GROUP_CHANNELS)
    row = sample * positions + position
    values = _load(x, skip, row, column, mask, x_channels, channels, HAS_SKIP)
    if HAS_OFFSET:
        added = tl.load(
            offset + (sample // offset_share) * offset_stride + column, mask=in_group < GROUP_CHANNELS, other=0.0
        )
        values += added.to(tl.float32)
    count = positions * GROUP_CHANNELS
    mean = tl.sum(tl.where(mask, values, 0.0)) / count
    centred = tl.where(mask, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / count + eps)
    gamma = tl.load(weight + column, mask=in_group < GROUP_CHANNELS, other=0.0).to(tl.float32)
    beta = tl.load(bias + column, mask=in_group < GROUP_CHANNELS, other=0.0).to(tl.float32)
    y = centred * rstd * gamma + beta
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + row.to(tl.int64) * channels + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sums(
    x, skip, offset, sums, positions, x_channels, channels, chunk, chunks, offset_stride, offset_share,
    HAS_SKIP: tl.constexpr, HAS_OFFSET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums and sums of squares of each channel over the positions of a chunk."""
    sample, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if HAS_OFFSET:
        added = tl.load(
            offset + (sample // offset_share) * offset_stride + column, mask=column < channels, other=0.0
        ).to(tl.float32)
    for start in range(0, chunk, BLOCK_P):
        position = part * chunk + start + tl.arange(0, BLOCK_P)[:, None]
        mask = (position < positions) & (column < channels)
        values = _load(x, skip, sample * positions + position, column, mask, x_channels, channels, HAS_SKIP)
        if HAS_OFFSET:
            values = tl.where(mask, values + added, 0.0)
        total += values
        squares += values * values
    where = sums + (sample * chunks + part) * 2 * channels + tl.arange(0, BLOCK_C)
    is_channel = tl.arange(0, BLOCK_C) < channels
    tl.store(where, tl.sum(total, 0), mask=is_channel)
    tl.store(where + channels, tl.sum(squares, 0), mask=is_channel)


@triton.jit
def _scales(
    sums, offset, weight, bias, scales, positions, x_channels, channels, num_groups, eps, chunks, offset_stride,
    offset_share, HAS_OFFSET: tl.constexpr, GROUP_CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What each channel is multiplied by, and what is added then."""
    sample, group = tl.program_id(0), tl.program_id(1)
    in_group = tl.arange(0, BLOCK_G)
    is_channel = in_group < GROUP_CHANNELS
    column = group * GROUP_CHANNELS + in_group
    part = tl.arange(0, BLOCK_N)[:, None]
    where = sums + (sample * chunks + part) * 2 * channels + column[None, :]
    mask = (part < chunks) & is_channel[None, :]
    count = positions * GROUP_CHANNELS
    mean = tl.sum(tl.load(where, mask=mask, other=0.0)) / count
    variance = tl.sum(tl.load(where + channels, mask=mask, other=0.0)) / count - mean * mean
    scale = tl.rsqrt(tl.maximum(variance, 0.0) + eps) * tl.load(weight + column, mask=is_channel, other=0.0).to(
        tl.float32
    )
    shift = tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32) - mean * scale
    if HAS_OFFSET:
        added = tl.load(offset + (sample // offset_share) * offset_stride + column, mask=is_channel, other=0.0)
        shift += added.to(tl.float32) * scale
    tl.store(scales + sample * 2 * channels + column, scale, mask=is_channel)
    tl.store(scales + sample * 2 * channels + channels + column, shift, mask=is_channel)


@triton.jit
def _apply(
    x, skip, scales, out, positions, x_channels, channels,
    HAS_SKIP: tl.constexpr, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    position = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    mask = (position < positions) & (column < channels)
    row = sample * positions + position
    values = _load(x, skip, row, column, mask, x_channels, channels, HAS_SKIP)
    scale = tl.load(scales + sample * 2 * channels + column, mask=column < channels, other=0.0)
    shift = tl.load(scales + sample * 2 * channels + channels + column, mask=column < channels, other=0.0)
    y = values * scale + shift
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + row.to(tl.int64) * channels + column, y.to(out.dtype.element_ty), mask=mask)
