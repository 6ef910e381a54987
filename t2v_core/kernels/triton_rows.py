"""Operations on rows of channels: sums, LayerNorm of what they give, and rows that find their place in an image."""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Values of a tile, and its warps. On an H200, LayerNorm of 262144 rows of 320 channels takes 84 us with one warp and
# 133 with four; with 1280 channels, four are faster.
_SUMMED, _JOINED = (2048, 4), (1024, 1)
_NARROW, _WIDE, _MOST_NARROW = (2048, 1), (4096, 4), 512


def layer_norm(x: Tensor, norm: nn.LayerNorm, offset: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See `plain.layer_norm`."""
    return _layer_norm(x, None, offset, norm, None, dtype)[1]


def add_layer_norm(
    x: Tensor,
    delta: Tensor,
    offset: Tensor,
    norm: nn.LayerNorm,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See `plain.add_layer_norm`."""
    return _layer_norm(x, delta, offset, norm, out, dtype)


def add(x: Tensor, delta: Tensor, offset: Tensor) -> Tensor:
    """See `plain.add`."""
    x, delta = x.contiguous(), delta.contiguous()
    out = torch.empty_like(x)
    channels = x.shape[-1]
    rows = x.numel() // channels
    block_c = triton.next_power_of_2(channels)
    values, num_warps = _SUMMED
    block_r = max(1, values // block_c)
    _add[(triton.cdiv(rows, block_r),)](
        x, delta, offset, out, rows, channels, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def join_quarters(corners: Tensor, bias: Tensor) -> Tensor:
    """See `plain.join_quarters`."""
    corners = corners.contiguous()
    b, f, h, w, channels = corners.shape
    height, width, channels = 2 * (h - 1), 2 * (w - 1), channels // 4
    out = corners.new_empty(b, f, height, width, channels)
    rows = out.numel() // channels
    block_c = triton.next_power_of_2(channels)
    values, num_warps = _JOINED
    block_r = max(1, values // block_c)
    _join_quarters[(triton.cdiv(rows, block_r),)](
        corners, bias, out, rows, height, width, channels, BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _layer_norm(
    x: Tensor, delta: Tensor | None, offset: Tensor, norm: nn.LayerNorm, total: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    if total is None:
        total = x if delta is None else torch.empty_like(x)
    channels = x.shape[-1]
    rows = x.numel() // channels
    block_c = triton.next_power_of_2(channels)
    values, num_warps = _NARROW if block_c <= _MOST_NARROW else _WIDE
    block_r = max(1, values // block_c)
    _normalise[(triton.cdiv(rows, block_r),)](
        x, x if delta is None else delta.contiguous(), offset, norm.weight, norm.bias, total, out,
        rows, channels, total.stride(-2), norm.eps,
        HAS_DELTA=delta is not None, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return total, out


@triton.jit
def _add(x, delta, offset, out, rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows) & (column < channels)
    where = row.to(tl.int64) * channels + column
    total = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(delta + where, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(offset + column, mask=column < channels, other=0.0).to(tl.float32)
    tl.store(out + where, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _join_quarters(corners, bias, out, rows, height, width, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows) & (column < channels)
    image, position = row // (height * width), row % (height * width)
    value = load_quarter(corners, image, position, column, mask, height, width, channels)
    value += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * channels + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def load_quarter(corners, image, position, column, mask, height, width, channels):
    """What a corner has of the pixel at such a position of an image of twice the size, as float32."""
    y, x = position // width, position % width
    p, q = y % 2, x % 2
    corner = (tl.cast(image, tl.int64) * (height // 2 + 1) + y // 2 + p) * (width // 2 + 1) + x // 2 + q
    return tl.load(corners + (corner * 4 + 2 * p + q) * channels + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalise(
    x, delta, offset, weight, bias, total, out, rows, channels, total_stride, eps,
    HAS_DELTA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # From the end to the beginning: the rows that were written last are still in the cache.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows) & (column < channels)
    where = row.to(tl.int64) * channels + column
    values = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(offset + column, mask=column < channels, other=0.0).to(tl.float32)
    if HAS_DELTA:
        values += tl.load(delta + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + row.to(tl.int64) * total_stride + column, values.to(total.dtype.element_ty), mask=mask)
    mean = tl.sum(values, 1)[:, None] / channels
    centred = tl.where(mask, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / channels + eps)
    gamma = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    beta = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    tl.store(out + where, (centred * rstd * gamma + beta).to(out.dtype.element_ty), mask=mask)
