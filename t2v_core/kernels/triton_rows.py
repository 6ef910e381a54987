"""Operations on rows of channels: sums, and LayerNorm of what they give."""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_TILE_VALUES = 4096


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """See `plain.layer_norm`."""
    return _layer_norm(x, None, norm)[1]


def add_layer_norm(x: Tensor, delta: Tensor, norm: nn.LayerNorm, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `plain.add_layer_norm`."""
    return _layer_norm(x, delta, norm, out)


def add(x: Tensor, delta: Tensor, offset: Tensor) -> Tensor:
    """See `plain.add`."""
    x, delta = x.contiguous(), delta.contiguous()
    out = torch.empty_like(x)
    channels = x.shape[-1]
    rows = x.numel() // channels
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, _TILE_VALUES // block_c)
    _add[(triton.cdiv(rows, block_r),)](
        x, delta, offset, out, rows, channels, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4
    )
    return out


def _layer_norm(
    x: Tensor, delta: Tensor | None, norm: nn.LayerNorm, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = torch.empty_like(x)
    if total is None:
        total = x if delta is None else torch.empty_like(x)
    channels = x.shape[-1]
    rows = x.numel() // channels
    block_c = triton.next_power_of_2(channels)
    block_r = max(1, _TILE_VALUES // block_c)
    _normalise[(triton.cdiv(rows, block_r),)](
        x, x if delta is None else delta.contiguous(), norm.weight, norm.bias, total, out,
        rows, channels, total.stride(-2), norm.eps,
        HAS_DELTA=delta is not None, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
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
def _normalise(
    x, delta, weight, bias, total, out, rows, channels, total_stride, eps,
    HAS_DELTA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows) & (column < channels)
    where = row.to(tl.int64) * channels + column
    values = tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        values += tl.load(delta + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + row.to(tl.int64) * total_stride + column, values.to(total.dtype.element_ty), mask=mask)
    mean = tl.sum(values, 1)[:, None] / channels
    centred = tl.where(mask, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / channels + eps)
    gamma = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    beta = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    tl.store(out + where, (centred * rstd * gamma + beta).to(out.dtype.element_ty), mask=mask)
