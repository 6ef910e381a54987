"""GroupNorm and SiLU over channels-last frames, with what comes before it: an added offset, or a second input.

A group of few values is normalised by one program, which reads it once, and one of some more by a program that reads it
twice, where there are no more groups than processors. For others, see `triton_group_scales`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from t2v_core.kernels.triton_group_scales import SIZES, apply_scales, beside, load, scales_of
from t2v_core.kernels.triton_instructions import silu

_WHOLE_GROUP_VALUES = 16384  # that one program holds in registers
# Fewer channels beside each other in memory are read too slowly by groups, but for those that are whole sectors of it:
# for 8 images of 32x32 and 512 channels, 9 us instead of 20 by three kernels.
_WHOLE_GROUP_CHANNELS, _SECTOR_CHANNELS = 30, 16
# Of a group that is read twice. On an H200, it takes 11 us instead of 17 for 2 rows of 16 frames of 8x8 and 1280
# channels, 53 instead of 49 for 16 rows of them, and 23 instead of 17 where groups are twice as large.
_TWICE_READ_VALUES, _PART_VALUES = 65536, 16384
_PART_WARPS, _PART_WARPS_OF_TWO = 32, 16  # of one input, and of two: 11 and 14 us, and 13 and 16 the other way round
_TWICE_READ_GROUPS = 132
_WARPS = ((1024, 2), (4096, 4), (8192, 8), (16384, 16))  # for whole groups of up to so many values
_TAPS = 3  # of a convolution over time


def group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    *,
    over_frames: bool,
    silu: bool,
    offset: Tensor | None = None,
    skip: Tensor | None = None,
    dtype: torch.dtype | None = None,
    unfold: bool = False,
) -> Tensor:
    """See `plain.group_norm`."""
    return _group_norm(x, None, skip, offset, norm, over_frames=over_frames, silu=silu, dtype=dtype, unfold=unfold)[1]


def add_group_norm(
    x: Tensor,
    delta: Tensor,
    offset: Tensor | None,
    norm: nn.GroupNorm,
    *,
    over_frames: bool,
    silu: bool,
    dtype: torch.dtype | None = None,
    unfold: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `plain.add_group_norm`."""
    offset = None if offset is None else offset[None]
    return _group_norm(x, delta, None, offset, norm, over_frames=over_frames, silu=silu, dtype=dtype, unfold=unfold)


def unfolds(x: Tensor, norm: nn.GroupNorm) -> bool:
    """Whether what is normed over frames can be unfolded: where one program holds a group. x: (b, f, h, w, c)."""
    _, f, h, w, channels = x.shape
    return _is_whole(f * h * w, channels // norm.num_groups)


def _is_whole(positions: int, group_channels: int) -> bool:
    return _is_read_by_groups(group_channels) and _values(positions, group_channels) <= _WHOLE_GROUP_VALUES


def _is_read_by_groups(group_channels: int) -> bool:
    return group_channels >= _WHOLE_GROUP_CHANNELS or group_channels % _SECTOR_CHANNELS == 0


def _values(positions: int, group_channels: int) -> int:
    """Of a group, in a program's registers."""
    return triton.next_power_of_2(positions) * triton.next_power_of_2(group_channels)


def _group_norm(
    x: Tensor,
    delta: Tensor | None,
    skip: Tensor | None,
    offset: Tensor | None,
    norm: nn.GroupNorm,
    *,
    over_frames: bool,
    silu: bool,
    dtype: torch.dtype | None,
    unfold: bool,
) -> tuple[Tensor, Tensor]:
    """Returns x + delta + offset where there is a delta, or else x, and what becomes of it."""
    b, f, h, w, x_channels = x.shape
    samples, positions = (b, f * h * w) if over_frames else (b * f, h * w)
    channels = x_channels + (0 if skip is None else skip.shape[-1])
    group_channels = channels // norm.num_groups
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    is_whole = _is_whole(positions, group_channels)
    assert not unfold or (over_frames and is_whole)
    taps = _TAPS if unfold else 1
    out = x.new_empty(b, f, h, w, taps * channels, dtype=dtype)

    values = _values(positions, group_channels)
    is_twice_read = values <= _TWICE_READ_VALUES and samples * norm.num_groups <= _TWICE_READ_GROUPS
    if not is_whole and not (is_twice_read and _is_read_by_groups(group_channels)):
        skip = None if skip is None else skip.contiguous()
        scales = scales_of(x, total, norm, samples, delta=delta, skip=skip, offset=offset)
        apply_scales(total, skip, scales, out, silu=silu)
        return total, out

    block_g = triton.next_power_of_2(group_channels)
    second, added, offset_at, flags = beside(x, delta, skip, offset, samples)
    inputs = x, second, added, norm.weight, norm.bias, total, out, positions, x_channels, channels, norm.eps, *offset_at
    sizes = {**flags, "SILU": silu, "GROUP_CHANNELS": group_channels, "BLOCK_G": block_g}
    if is_whole:
        _whole_groups[(samples, norm.num_groups)](
            *inputs, h * w, **sizes, TAPS=taps, BLOCK_P=values // block_g,
            num_warps=next(warps for most, warps in _WARPS if values <= most), enable_fp_fusion=True,
        )  # fmt: skip
    else:
        _groups_in_parts[(samples, norm.num_groups)](
            *inputs, **sizes, BLOCK_P=_PART_VALUES // block_g,
            num_warps=_PART_WARPS if second is x else _PART_WARPS_OF_TWO, enable_fp_fusion=True,
        )  # fmt: skip
    return total, out


def join_quarters_group_norm(
    corners: Tensor, bias: Tensor, norm: nn.GroupNorm, *, silu: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """See `plain.join_quarters_group_norm`."""
    b, f, h, w, channels = corners.shape
    joined = corners.new_empty(b, f, 2 * h - 2, 2 * w - 2, channels // 4)
    out = torch.empty_like(joined, dtype=dtype)
    scales = scales_of(corners.contiguous(), joined, norm, b * f, offset=bias[None], has_quarters=True)
    apply_scales(joined, None, scales, out, silu=silu)
    return joined, out


@triton.jit(do_not_specialize=SIZES)
def _whole_groups(
    x, second, offset, weight, bias, summed, out, positions, x_channels, channels, eps, offset_stride, offset_share,
    pixels,
    HAS_SKIP: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_OFFSET: tl.constexpr, SILU: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Each is read once. With several taps, a frame has beside it those around it, and zeros for those there are not.

    So positions are those of all frames then: where a frame would be that of a tap before the first or after the last,
    there is one without that tap at the other end.
    """
    sample, group = tl.program_id(0), tl.program_id(1)
    position = tl.arange(0, BLOCK_P)[:, None]
    in_group = tl.arange(0, BLOCK_G)[None, :]
    column = group * GROUP_CHANNELS + in_group
    mask = (position < positions) & (in_group < GROUP_CHANNELS)
    row = sample * positions + position
    values = load(x, second, row, column, mask, x_channels, channels, HAS_SKIP, HAS_DELTA)
    # These are asked for before the first sum, behind which nothing would be.
    gamma = tl.load(weight + column, mask=in_group < GROUP_CHANNELS, other=0.0).to(tl.float32)
    beta = tl.load(bias + column, mask=in_group < GROUP_CHANNELS, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        added = tl.load(
            offset + (sample // offset_share) * offset_stride + column, mask=in_group < GROUP_CHANNELS, other=0.0
        )
        values += added.to(tl.float32)
    if HAS_DELTA:
        tl.store(summed + row.to(tl.int64) * channels + column, values.to(summed.dtype.element_ty), mask=mask)
    count = positions * GROUP_CHANNELS
    mean = tl.sum(tl.where(mask, values, 0.0)) / count
    centred = tl.where(mask, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / count + eps)
    y = centred * rstd * gamma + beta
    if SILU:
        y = silu(y)
    y = y.to(out.dtype.element_ty)
    if TAPS == 1:
        tl.store(out + row.to(tl.int64) * channels + column, y, mask=mask)
    else:
        for tap in tl.static_range(TAPS):
            moved = position + (TAPS // 2 - tap) * pixels
            wrapped = tl.where(moved < 0, moved + positions, tl.where(moved < positions, moved, moved - positions))
            where = (sample * positions + wrapped).to(tl.int64) * TAPS + tap
            tl.store(out + where * channels + column, tl.where(moved == wrapped, y, 0.0), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _groups_in_parts(
    x, second, offset, weight, bias, summed, out, positions, x_channels, channels, eps, offset_stride, offset_share,
    HAS_SKIP: tl.constexpr, HAS_DELTA: tl.constexpr, HAS_OFFSET: tl.constexpr, SILU: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """As `_whole_groups`, of groups that a program cannot hold: what is read again is in the cache."""
    sample, group = tl.program_id(0), tl.program_id(1)
    in_group = tl.arange(0, BLOCK_G)[None, :]
    column, is_channel = group * GROUP_CHANNELS + in_group, in_group < GROUP_CHANNELS
    added = tl.zeros((1, BLOCK_G), tl.float32)
    if HAS_OFFSET:
        where = offset + (sample // offset_share) * offset_stride + column
        added = tl.load(where, mask=is_channel, other=0.0).to(tl.float32)
    total, squares = tl.zeros((BLOCK_P, BLOCK_G), tl.float32), tl.zeros((BLOCK_P, BLOCK_G), tl.float32)
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (position < positions) & is_channel
        row = sample * positions + position
        values = load(x, second, row, column, mask, x_channels, channels, HAS_SKIP, HAS_DELTA)
        values = tl.where(mask, values + added, 0.0)
        if HAS_DELTA:
            tl.store(summed + row.to(tl.int64) * channels + column, values.to(summed.dtype.element_ty), mask=mask)
        total += values
        squares += values * values
    # Not before the loop, through which there are no registers for them.
    gamma = tl.load(weight + column, mask=is_channel, other=0.0).to(tl.float32)
    beta = tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)
    count = positions * GROUP_CHANNELS
    mean = tl.sum(total) / count
    rstd = tl.rsqrt(tl.maximum(tl.sum(squares) / count - mean * mean, 0.0) + eps)
    scale = rstd * gamma
    shift = beta - mean * scale
    if HAS_DELTA:  # each thread reads what it has written itself, and that holds the offset
        source, shift_of_source = summed, shift
    else:
        source, shift_of_source = x, shift + added * scale
    for start in range(0, positions, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (position < positions) & is_channel
        row = sample * positions + position
        values = load(source, second, row, column, mask, x_channels, channels, HAS_SKIP, False)
        y = values * scale + shift_of_source
        if SILU:
            y = silu(y)
        tl.store(out + row.to(tl.int64) * channels + column, y.to(out.dtype.element_ty), mask=mask)
