"""The KL autoencoder of Stable Diffusion: 8 x 8 pixels to one latent of 4 channels, frame by frame.

Frames do not see each other here, so a video of any length is coded in chunks of bounded memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from t2v_core.config import AutoencoderConfig
from t2v_core.kernels import single_head_attention
from t2v_core.layers import (
    ResnetBlock,
    Sum,
    Unfinished,
    Upsample,
    conv_frames,
    conv_normed,
    summed_and_normed,
    total,
)
from t2v_core.shapes import SPATIAL_SCALE

_EPS = 1e-6
# A decode needs about 2 KiB a pixel in fp16, so a chunk stays near 1 GiB. One frame is always a chunk.
_MAX_PIXELS_PER_CHUNK = 2**19


class Posterior(NamedTuple):
    """A Gaussian over latents for each frame. Both: (b, c, f, h, w)."""

    mean: Tensor
    std: Tensor


class Autoencoder(nn.Module):
    """Pixels in [-1, 1] to latents and back. Latents are scaled to about unit variance, as the UNet sees them."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder: nn.Module = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, video: Tensor) -> Posterior:
        """The latents' distribution. video: (b, 3, f, h, w) in [-1, 1], sides multiples of 8."""
        b, _, _, h, w = video.shape
        frames = rearrange(video, "b c f h w -> 1 (b f) h w c")
        parts = [
            conv_frames(self.encoder(chunk.contiguous()), self.quant_conv)
            for chunk in torch.split(frames, frames_per_chunk(h, w), dim=1)
        ]
        mean, log_variance = rearrange(torch.cat(parts, dim=1), "1 (b f) h w c -> b c f h w", b=b).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return Posterior(mean * self.config.scaling_factor, std * self.config.scaling_factor)

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """The video of one request, some frames at a time.

        latents: (c, f, h, w); yields (f', 3, 8h, 8w), about in [-1, 1], until all f frames are out.
        """
        frames = rearrange(latents, "c f h w -> f c h w")
        h, w = frames.shape[-2] * SPATIAL_SCALE, frames.shape[-1] * SPATIAL_SCALE
        for chunk in torch.split(frames, frames_per_chunk(h, w)):
            yield self.decode_frames(chunk)

    def decode_frames(self, latents: Tensor) -> Tensor:
        """Frames from their latents, at once. latents: (f, c, h, w) -> (f, 3, 8h, 8w), about in [-1, 1]."""
        x = rearrange(latents / self.config.scaling_factor, "f c h w -> 1 f h w c").contiguous()
        return rearrange(self.decoder(conv_frames(x, self.post_quant_conv)), "1 f h w c -> f c h w")


def frames_per_chunk(height: int, width: int) -> int:
    """How many frames of this size, in pixels, are coded at once."""
    return max(1, _MAX_PIXELS_PER_CHUNK // (height * width))


class Encoder(nn.Module):
    """Image to twice the latent channels: mean and log-variance, before `quant_conv`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _DownBlock(
                [channels[max(level - 1, 0)]] + [c] * (config.layers_per_block - 1),
                c,
                groups=groups,
                downsample=level < len(channels) - 1,
            )
            for level, c in enumerate(channels)
        )
        self.mid_block = _MidBlock(channels[-1], groups=groups, attention=config.mid_block_attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, f, h, w, 3) -> (b, f, h / 8, w / 8, 2c)."""
        x = conv_frames(x, self.conv_in)
        for block in self.down_blocks:
            x = block(x)
        return conv_normed(self.mid_block(x), self.conv_norm_out, self.conv_out)


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to an image."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _MidBlock(channels[0], groups=groups, attention=config.mid_block_attention)
        self.up_blocks = nn.ModuleList(
            _UpBlock(
                [channels[max(level - 1, 0)]] + [c] * config.layers_per_block,
                c,
                groups=groups,
                upsample=level < len(channels) - 1,
            )
            for level, c in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z: (b, f, h, w, c) -> (b, f, 8h, 8w, 3)."""
        x = self.mid_block(conv_frames(z, self.conv_in))
        for block in self.up_blocks:
            x = block(x)
        return conv_normed(x, self.conv_norm_out, self.conv_out)


class _DownBlock(nn.Module):
    def __init__(self, in_channels: list[int], out_channels: int, *, groups: int, downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, out_channels, groups=groups, eps=_EPS) for c in in_channels)
        self.downsamplers = nn.ModuleList([_Downsample(out_channels)] if downsample else [])

    def forward(self, x: Tensor | Sum) -> Tensor | Sum:
        for resnet in self.resnets:
            x = resnet(x)
        for downsample in self.downsamplers:
            x = downsample(total(x))
        return x


class _UpBlock(nn.Module):
    def __init__(self, in_channels: list[int], out_channels: int, *, groups: int, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, out_channels, groups=groups, eps=_EPS) for c in in_channels)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Unfinished) -> Unfinished:
        for resnet in self.resnets:
            x = resnet(x)
        for upsample in self.upsamplers:
            x = total(x)
            x = upsample(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


class _MidBlock(nn.Module):
    def __init__(self, channels: int, *, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([_PixelAttention(channels, groups=groups)] if attention else [])

    def forward(self, x: Tensor | Sum) -> Sum:
        first, second = self.resnets
        x = first(x)
        for attention in self.attentions:
            x = attention(x)
        return second(x)


class _PixelAttention(nn.Module):
    """One head of attention between all pixels of an image. Unlike the UNet's, its projections have biases."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor | Sum) -> Sum:
        x, tokens = summed_and_normed(x, self.group_norm, over_frames=False, silu=False)
        b, _, h, _, _ = x.shape
        tokens = rearrange(tokens, "b f h w c -> (b f) (h w) c")
        out = single_head_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return Sum(x, rearrange(self.to_out(out), "(b f) (h w) c -> b f h w c", b=b, h=h))


class _Downsample(nn.Module):
    """Halve both sides. Padded on the right and at the bottom only, as this autoencoder was trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return conv_frames(F.pad(x, (0, 0, 0, 1, 0, 1)), self.conv)
