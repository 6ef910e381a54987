"""The building blocks of the networks: residual blocks, temporal convolutions, changes of size.

Modules and parameters carry the names of the diffusers checkpoint layout, so weights load by name.
Letters in shapes: b batch, c channels, f frames, h height, w width.

Activations are (b, f, h, w, c) in memory, from the first layer to the last. So frames are images with channels last,
a convolution over time is one over (f, h w) of the same memory, each pixel is a token, and nothing is ever permuted.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from t2v_core import kernels
from t2v_core.kernels import (
    add,
    add_group_norm,
    conv_corners,
    conv_over_time,
    group_norm,
    group_norm_conv,
    join_quarters,
    join_quarters_group_norm,
    unfolds_over_time,
)
from t2v_core.kernels.fp8 import dtype_for, quantise


class Sum(NamedTuple):
    """x + delta + offset, not added yet: a norm that reads it does that on its way.

    x, delta: (b, f, h, w, c), offset: (c,).
    """

    x: Tensor
    delta: Tensor
    offset: Tensor | None = None


class Quarters(NamedTuple):
    """An image of twice the height and width, not put together yet; as `Sum`, and for the arguments `join_quarters`."""

    corners: Tensor
    bias: Tensor


Unfinished = Tensor | Sum | Quarters


def total(x: Unfinished) -> Tensor:
    """The sum or the image, if it is one, in numbers."""
    if isinstance(x, Quarters):
        return join_quarters(*x)
    return add(*x) if isinstance(x, Sum) else x


def summed_and_normed(
    x: Unfinished,
    norm: nn.GroupNorm,
    *,
    over_frames: bool,
    silu: bool,
    dtype: torch.dtype | None = None,
    unfold: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum or the image, if it is one, and the norm of it, of a type of its own if one is given."""
    if isinstance(x, Sum):
        return add_group_norm(*x, norm, over_frames=over_frames, silu=silu, dtype=dtype, unfold=unfold)
    if isinstance(x, Quarters):
        assert not over_frames
        return join_quarters_group_norm(*x, norm, silu=silu, dtype=dtype)
    return x, group_norm(x, norm, over_frames=over_frames, silu=silu, dtype=dtype, unfold=unfold)


def conv_normed(x: Unfinished, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    """The last layers of a network: a 3x3 convolution of every frame, of the SiLU of its norm."""
    if isinstance(x, Sum):
        return group_norm_conv(x.x, norm, conv, delta=x.delta, offset=x.offset)
    return group_norm_conv(total(x), norm, conv)


def conv_frames(x: Tensor, conv: nn.Conv2d, *, bias: bool = True) -> Tensor:
    """A convolution of every frame, (b, f, h, w, c); without its bias, where what follows adds that."""
    if not bias:
        assert conv.bias is not None
        assert conv.stride == (1, 1)
        return kernels.conv_frames(x, conv.weight, conv.bias.dtype)
    frames = rearrange(x, "b f h w c -> (b f) c h w")
    out = F.conv2d(frames, conv.weight, conv.bias, conv.stride, conv.padding)
    return rearrange(out, "(b f) c h w -> b f h w c", b=len(x)).contiguous()


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of each timestep at dim / 2 frequencies. timesteps: (b,) -> (b, dim), float32.

    Timesteps may be fractional. (Vaswani et al. 2017, 3.5, in the order that this family uses.)
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers from the sinusoids to the width that the residual blocks read."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around an additive time embedding, and a shortcut."""

    offset: Tensor | None

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.register_buffer("offset", None, persistent=False)

    def fuse(self) -> None:
        """Add up the biases of both branches."""
        self.offset = self._offset().detach()

    def quantise(self) -> None:
        """Let both convolutions have fp8."""
        quantise(self.conv1, self.conv2)

    def forward(self, x: Unfinished, skip: Tensor | None = None, time: Tensor | None = None) -> Sum:
        """x: (b, f, h, w, c), skip: more channels of the input, (b, f, h, w, c2) -> (b, f, h, w, out_channels).

        time: (b, out_channels), what the time embedding adds after the first convolution, that one's bias included.
        """
        dtype = dtype_for(self.conv1.weight)
        if skip is None:
            x, residual = summed_and_normed(x, self.norm1, over_frames=False, silu=True, dtype=dtype)
        else:
            x = total(x)
            residual = group_norm(x, self.norm1, over_frames=False, silu=True, skip=skip, dtype=dtype)
        residual = conv_frames(residual, self.conv1, bias=False)
        if time is None:
            assert self.conv1.bias is not None
            time = self.conv1.bias[None]
        dtype = dtype_for(self.conv2.weight)
        residual = group_norm(residual, self.norm2, over_frames=False, silu=True, offset=time, dtype=dtype)
        residual = conv_frames(residual, self.conv2, bias=False)
        return Sum(self._shortcut(x, skip), residual, self._offset() if self.offset is None else self.offset)

    def _offset(self) -> Tensor:
        assert self.conv2.bias is not None
        if self.conv_shortcut is None:
            return self.conv2.bias
        assert self.conv_shortcut.bias is not None
        return self.conv2.bias + self.conv_shortcut.bias

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Without its bias."""
        if self.conv_shortcut is None:
            return x if skip is None else torch.cat([x, skip], dim=-1)
        weight = self.conv_shortcut.weight.flatten(1)
        if skip is None:
            return F.linear(x, weight)
        of_x, of_skip = torch.split(weight, [x.shape[-1], skip.shape[-1]], dim=1)
        shortcut = F.linear(x, of_x)
        shortcut.flatten(0, -2).addmm_(skip.flatten(0, -2), of_skip.T)
        return shortcut


class TemporalConvLayer(nn.Module):
    """Four convolutions over time and a shortcut around all of them. Normalisation spans all frames."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()

        def conv(drop: list[nn.Module]) -> nn.Sequential:
            over_time = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
            return nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), *drop, over_time)

        self.conv1 = conv([])  # the references drop nothing here, which shifts the names of the weights
        self.conv2 = conv([nn.Dropout(0.1)])
        self.conv3 = conv([nn.Dropout(0.1)])
        self.conv4 = conv([nn.Dropout(0.1)])

    def forward(self, x: Tensor | Sum) -> Sum:
        """x: (b, f, h, w, c), same shape out."""
        norm, _, conv = _parts(self.conv1)
        unfold = unfolds_over_time(x.x if isinstance(x, Sum) else x, norm, conv.weight)
        dtype = dtype_for(conv.weight)
        x, residual = summed_and_normed(x, norm, over_frames=True, silu=True, dtype=dtype, unfold=unfold)
        residual = conv_over_time(residual, conv.weight, x.dtype)
        for layer in (self.conv2, self.conv3, self.conv4):
            assert conv.bias is not None
            offset = conv.bias[None]
            norm, drop, conv = _parts(layer)
            dtype = dtype_for(conv.weight)
            residual = group_norm(
                residual, norm, over_frames=True, silu=True, offset=offset, dtype=dtype, unfold=unfold
            )
            residual = conv_over_time(drop(residual), conv.weight, x.dtype)
        return Sum(x, residual, conv.bias)

    def quantise(self) -> None:
        """Let all of them have fp8."""
        quantise(*(_parts(layer)[2] for layer in (self.conv1, self.conv2, self.conv3, self.conv4)))


def _parts(layer: nn.Sequential) -> tuple[nn.GroupNorm, nn.Module, nn.Conv3d]:
    norm, conv = layer[0], layer[-1]
    assert isinstance(norm, nn.GroupNorm)
    assert isinstance(conv, nn.Conv3d)
    return norm, layer[2] if len(layer) == 4 else nn.Identity(), conv


class Downsample(nn.Module):
    """Halve both sides, rounding up. x: (b, f, h, w, c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv_frames(x, self.conv)


class Upsample(nn.Module):
    """Enlarge to a given size by the nearest neighbour, then smooth. x: (b, f, h, w, c)."""

    fused: Tensor | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.register_buffer("fused", None, persistent=False)

    def fuse(self) -> None:
        """Sum the taps of the kernel that fall on the same pixel: each quarter of the result is a 2x2 convolution.

        For each of (row, column) of a 2x2 square of the result, (c, c, 2, 2), one after the other: 4/9 of the products.
        """
        exact = torch.promote_types(self.conv.weight.dtype, torch.float32)
        kernel = self.conv.weight.detach().to(exact)
        # Of a square's two rows, the upper has tap 0 on the pixel above and the others on its own; and so on.
        taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=exact, device=kernel.device)
        quarters = torch.einsum("oikl,pyk,qxl->pqoiyx", kernel, taps, taps)
        fused = rearrange(quarters, "p q o i y x -> (p q o) i y x").to(self.conv.weight.dtype)
        self.fused = fused.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor | Quarters:
        b, _, h, w, _ = x.shape
        if self.fused is None or size != (2 * h, 2 * w):
            enlarged = F.interpolate(rearrange(x, "b f h w c -> (b f) c h w"), size=size, mode="nearest")
            return conv_frames(rearrange(enlarged, "(b f) c h w -> b f h w c", b=b), self.conv)
        assert self.conv.bias is not None
        return Quarters(conv_corners(x, self.fused), self.conv.bias)
