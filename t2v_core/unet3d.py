"""The denoiser: a UNet over space whose every layer is followed by one over time (ModelScope, Wang et al. 2023)."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

from t2v_core.config import UNetConfig
from t2v_core.layers import (
    Downsample,
    KeysValues,
    ResnetBlock,
    SpatialTransformer,
    TemporalConvLayer,
    TemporalTransformer,
    TimestepEmbedding,
    Upsample,
    each_frame,
    sinusoidal_embedding,
)

TextKeysValues = Mapping[nn.Module, KeysValues]  # of each spatial transformer

_TRANSFORMER_IN_HEADS = 8  # whatever the number of channels, unlike every other transformer here


class UNet3D(nn.Module):
    """Predicts the noise in a batch of latents."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        time_dim = channels[0] * 4

        self.time_embedding = TimestepEmbedding(channels[0], time_dim)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.transformer_in = TemporalTransformer(
            channels[0],
            heads=_TRANSFORMER_IN_HEADS,
            head_dim=config.attention_head_dim,
            groups=config.norm_num_groups,
        )

        self.down_blocks = nn.ModuleList()
        skip_channels = [channels[0]]
        for level, out_channels in enumerate(channels):
            is_last = level == len(channels) - 1
            in_channels = channels[max(level - 1, 0)]
            self.down_blocks.append(
                DownBlock(
                    config,
                    [in_channels] + [out_channels] * (config.layers_per_block - 1),
                    out_channels,
                    attention=config.attention[level],
                    downsample=not is_last,
                )
            )
            skip_channels += [out_channels] * (config.layers_per_block + (not is_last))

        self.mid_block = MidBlock(config, channels[-1])

        self.up_blocks = nn.ModuleList()
        x_channels = channels[-1]
        for level in reversed(range(len(channels))):
            out_channels = channels[level]
            in_channels_of_layers = []
            for _ in range(config.layers_per_block + 1):
                in_channels_of_layers.append(x_channels + skip_channels.pop())
                x_channels = out_channels
            self.up_blocks.append(
                UpBlock(
                    config,
                    in_channels_of_layers,
                    out_channels,
                    attention=config.attention[level],
                    upsample=level > 0,
                )
            )

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def read_text(self, text_embeds: Tensor) -> TextKeysValues:
        """All that the layers read in the text. It is the same at each step of a request. text_embeds: (b, n, d)."""
        readers = (module for module in self.modules() if isinstance(module, SpatialTransformer))
        return {reader: reader.keys_values(text_embeds) for reader in readers}

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor | TextKeysValues) -> Tensor:
        """eps, the predicted noise.

        latents: (b, c, f, h, w), any f, h, w >= 1; timesteps: (b,), fractional allowed;
        text: its embeddings, (b, n, d), or what `read_text` made of them.
        The result has the shape and the type of the latents.
        """
        if isinstance(text, Tensor):
            text = self.read_text(text)
        time_embedding = self.time_embedding(
            sinusoidal_embedding(timesteps, self.conv_in.out_channels).to(latents.dtype)
        )
        time_embedding = repeat(time_embedding, "b d -> (b f) d", f=latents.shape[2])

        x = each_frame(self.conv_in, latents)
        x = self.transformer_in(x)

        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, time_embedding, text)
            skips += block_skips
        x = self.mid_block(x, time_embedding, text)
        for block in self.up_blocks:
            x = block(x, skips, time_embedding, text)

        return each_frame(lambda frames: self.conv_out(F.silu(self.conv_norm_out(frames))), x)


class _Layers(nn.Module):
    """What all blocks are made of: residual and temporal convolutions, and transformers where there is attention."""

    def __init__(self, config: UNetConfig, in_channels: list[int], out_channels: int, num_attentions: int) -> None:
        super().__init__()
        groups = config.norm_num_groups
        heads = out_channels // config.attention_head_dim
        head_dim = config.attention_head_dim
        self.resnets = nn.ModuleList(
            ResnetBlock(c, out_channels, groups=groups, eps=1e-5, time_dim=config.block_out_channels[0] * 4)
            for c in in_channels
        )
        self.temp_convs = nn.ModuleList(TemporalConvLayer(out_channels, groups=groups) for _ in in_channels)
        self.attentions = nn.ModuleList(
            SpatialTransformer(
                out_channels, heads=heads, head_dim=head_dim, text_dim=config.cross_attention_dim, groups=groups
            )
            for _ in range(num_attentions)
        )
        self.temp_attentions = nn.ModuleList(
            TemporalTransformer(out_channels, heads=heads, head_dim=head_dim, groups=groups)
            for _ in range(num_attentions)
        )

    def convolve(self, i: int, x: Tensor, time_embedding: Tensor) -> Tensor:
        x = each_frame(partial(self.resnets[i], time_embedding=time_embedding), x)
        return self.temp_convs[i](x)

    def attend(self, i: int, x: Tensor, text: TextKeysValues) -> Tensor:
        if not self.attentions:
            return x
        x = self.attentions[i](x, text[self.attentions[i]])
        return self.temp_attentions[i](x)


class DownBlock(_Layers):
    """One resolution on the way down. It hands each layer's output to the way up."""

    def __init__(
        self, config: UNetConfig, in_channels: list[int], out_channels: int, *, attention: bool, downsample: bool
    ) -> None:
        super().__init__(config, in_channels, out_channels, len(in_channels) if attention else 0)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(self, x: Tensor, time_embedding: Tensor, text: TextKeysValues) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.convolve(i, x, time_embedding)
            x = self.attend(i, x, text)
            skips.append(x)
        for downsample in self.downsamplers:
            x = each_frame(downsample, x)
            skips.append(x)
        return x, skips


class MidBlock(_Layers):
    """The coarsest resolution: attention between two residual blocks."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__(config, [channels, channels], channels, num_attentions=1)

    def forward(self, x: Tensor, time_embedding: Tensor, text: TextKeysValues) -> Tensor:
        x = self.convolve(0, x, time_embedding)
        x = self.attend(0, x, text)
        return self.convolve(1, x, time_embedding)


class UpBlock(_Layers):
    """One resolution on the way up. Each layer takes one skip connection off the end of the list."""

    def __init__(
        self, config: UNetConfig, in_channels: list[int], out_channels: int, *, attention: bool, upsample: bool
    ) -> None:
        super().__init__(config, in_channels, out_channels, len(in_channels) if attention else 0)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], time_embedding: Tensor, text: TextKeysValues) -> Tensor:
        for i in range(len(self.resnets)):
            x = torch.cat([x, skips.pop()], dim=1)
            x = self.convolve(i, x, time_embedding)
            x = self.attend(i, x, text)
        for upsample in self.upsamplers:
            # Not simply twice the size: a side that was odd before it was halved must meet its skip connection.
            x = each_frame(partial(upsample, size=skips[-1].shape[-2:]), x)
        return x
