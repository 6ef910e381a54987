"""The last layers of a network: GroupNorm, SiLU and a 3x3 convolution to a few channels.

The library's convolutions have at least 64 channels out, and take as long for 3. Here one pass normalises each pixel
and multiplies it with the weights of all nine taps at once, as a product of few columns; and a second one adds up what
a pixel's neighbours have made for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from t2v_core.kernels.triton_group_scales import block_of_channels, scales_of
from t2v_core.kernels.triton_instructions import silu

_SIDE, _MOST_COLUMNS = 3, 128
_BLOCK_P, _MOST_BLOCK_C = 64, 64  # pixels and channels at a time
_ADDED_PIXELS = 64


def fits(conv: nn.Conv2d) -> bool:
    """Whether the kernels are made for such a convolution."""
    keeps_size = conv.kernel_size == (_SIDE, _SIDE) and conv.padding == (1, 1) and conv.stride == (1, 1)
    return keeps_size and _SIDE**2 * conv.out_channels <= _MOST_COLUMNS


def group_norm_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, *, delta: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """See `plain.group_norm_conv`."""
    b, f, h, w, channels = x.shape
    images, positions, out_channels = b * f, h * w, conv.out_channels
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    scales = scales_of(x, total, norm, images, delta=delta, offset=None if offset is None else offset[None])

    taps = conv.weight.permute(2, 3, 0, 1).reshape(-1, channels)  # (9 c2, c)
    columns = max(16, triton.next_power_of_2(len(taps)))
    # What is added up of bf16 would be rounded too coarsely.
    products = x.new_empty(images * positions, columns, dtype=torch.promote_types(x.dtype, torch.float16))
    block_c = max(16, min(_MOST_BLOCK_C, block_of_channels(channels, channels)))
    _multiply_taps[(triton.cdiv(positions, _BLOCK_P), images)](
        total, scales, taps, products, positions, channels, len(taps),
        BLOCK_P=_BLOCK_P, BLOCK_C=block_c, COLUMNS=columns, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    out = x.new_empty(b, f, h, w, out_channels)
    _add_taps[(triton.cdiv(positions, _ADDED_PIXELS), images)](
        products, norm.bias if conv.bias is None else conv.bias, out, h, w, out_channels,
        HAS_BIAS=conv.bias is not None, SIDE=_SIDE, COLUMNS=columns,
        BLOCK_P=_ADDED_PIXELS, BLOCK_C=triton.next_power_of_2(out_channels), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def _multiply_taps(
    x, scales, taps, out, positions, channels, columns,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each pixel, normalised, times the weights of every tap and channel out."""
    sample = tl.program_id(1)
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    row = (sample * positions + position).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((BLOCK_P, COLUMNS), tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        is_channel = channel < channels
        of_sample = scales + sample * 2 * channels + channel
        scale, shift = tl.load(of_sample, mask=is_channel), tl.load(of_sample + channels, mask=is_channel)
        mask = (position < positions) & is_channel[None, :]
        values = tl.load(x + row * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        y = values * scale[None, :] + shift[None, :]
        y = tl.where(is_channel[None, :], silu(y), 0.0).to(x.dtype.element_ty)
        mask = (column < columns) & is_channel[:, None]
        weight = tl.load(taps + column * channels + channel[:, None], mask=mask, other=0.0)
        total = tl.dot(y, weight, total, input_precision="ieee")
    tl.store(out + row * COLUMNS + column, total.to(out.dtype.element_ty), mask=position < positions)


@triton.jit
def _add_taps(
    products, bias, out, height, width, channels,
    HAS_BIAS: tl.constexpr, SIDE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """For every pixel, what the pixels around it have made for it."""
    image = tl.program_id(1).to(tl.int64) * height * width
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    y, x = position // width, position % width
    channel = tl.arange(0, BLOCK_C)[None, :]
    mask = (position < height * width) & (channel < channels)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    for tap in tl.static_range(SIDE * SIDE):
        above, left = tap // SIDE - SIDE // 2, tap % SIDE - SIDE // 2
        inside = (y + above >= 0) & (y + above < height) & (x + left >= 0) & (x + left < width)
        where = (position + above * width + left) * COLUMNS + tap * channels + channel
        total += tl.load(products + image * COLUMNS + where, mask=mask & inside, other=0.0).to(tl.float32)
    tl.store(out + image * channels + position * channels + channel, total.to(out.dtype.element_ty), mask=mask)
