"""The denoiser: a UNet over space whose every layer is followed by one over time (ModelScope, Wang et al. 2023)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from t2v_core.config import UNetConfig
from t2v_core.layers import (
    Downsample,
    ResnetBlock,
    Sum,
    TemporalConvLayer,
    TimestepEmbedding,
    Upsample,
    conv_frames,
    conv_normed,
    sinusoidal_embedding,
    total,
)
from t2v_core.transformers import KeysValues, SpatialTransformer, TemporalTransformer

TextKeysValues = Mapping[nn.Module, KeysValues]  # of each spatial transformer


class _Steering(NamedTuple):
    """What steers a call, beside the latents.

    time: (rows, c) of each residual block; text: of each spatial transformer;
    rows: which sample each row belongs to, where the two rows of a guided request share one; (rows,).
    """

    time: Mapping[nn.Module, Tensor]
    text: TextKeysValues
    rows: Tensor | None


class NoisePredictor(Protocol):
    """What a denoising step needs of a UNet: the network itself, or one whose calls are replayed."""

    config: UNetConfig

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def read_text(self, text_embeds: Tensor) -> TextKeysValues: ...

    def __call__(self, latents: Tensor, timesteps: Tensor, text: TextKeysValues, rows: Tensor) -> Tensor: ...

    def predict(
        self, latents: Tensor, timesteps: Tensor, text: TextKeysValues, rows: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


_TRANSFORMER_IN_HEADS = 8  # whatever the number of channels, unlike every other transformer here


class UNet3D(nn.Module):
    """Predicts the noise in a batch of latents."""

    time_weight: Tensor | None
    time_bias: Tensor | None

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
        self.register_buffer("time_weight", None, persistent=False)
        self.register_buffer("time_bias", None, persistent=False)
        # Found once, and not at each step: no modules of their own, but lists of some that are above.
        self._resnets = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        self.text_readers = [module for module in self.modules() if isinstance(module, SpatialTransformer)]

    def read_text(self, text_embeds: Tensor) -> TextKeysValues:
        """All that the layers read in the text. It is the same at each step of a request. text_embeds: (b, n, d)."""
        return {reader: reader.keys_values(text_embeds) for reader in self.text_readers}

    def fuse(self) -> None:
        """Lay the projections of the time embedding side by side, for one product. Their names stay, as parts of it."""
        blocks = self._resnets
        projections = [block.time_emb_proj for block in blocks if block.time_emb_proj is not None]
        weight, self.time_bias = self._time_projection()
        self.time_weight = weight.detach()
        for projection, part in zip(projections, torch.split(self.time_weight, _channels(blocks)), strict=True):
            projection.weight = nn.Parameter(part, requires_grad=False)

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Tensor | TextKeysValues, rows: Tensor | None = None
    ) -> Tensor:
        """eps, the predicted noise, one for each row of the text.

        latents: (b, c, f, h, w), any f, h, w >= 1; timesteps: (b,), fractional allowed;
        text: its embeddings, (rows, n, d), or what `read_text` made of them;
        rows: which of the latents each text is for, (rows,), the first b of them 0 to b - 1; None is one for each.
        Up to the first layer that reads the text, rows of the same latents are computed once.
        The result has the type of the latents.
        """
        return self.predict(latents, timesteps, text, rows)[0]

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | TextKeysValues,
        rows: Tensor | None = None,
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """eps, and what all resolutions but the finest make of the input: (rows, f, h, w, c).

        Where such `features` are given, of a step not long before, they are taken as they are, and only the finest
        resolution is computed anew (Ma et al. 2023, "DeepCache"). For the rest, see `forward`.
        """
        if isinstance(text, Tensor):
            text = self.read_text(text)
        steering = _Steering(self._read_time(timesteps, latents.dtype, rows), text, rows)

        x = rearrange(latents, "b c f h w -> b f h w c").contiguous()
        x = conv_frames(x, self.conv_in)
        x = total(self.transformer_in(x))

        skips = [x]
        finest, *coarser = self.down_blocks
        assert isinstance(finest, DownBlock)
        x = finest.layers(x, steering, skips)
        if features is None:
            features = self._coarser(finest.downsample(x, skips), coarser, steering, skips)
        x = self.up_blocks[-1](features, skips, steering)

        x = conv_normed(x, self.conv_norm_out, self.conv_out)
        return rearrange(x, "b f h w c -> b c f h w").contiguous(), features

    def _coarser(self, x: Tensor, blocks: Sequence[nn.Module], steering: _Steering, skips: list[Tensor]) -> Tensor:
        """Down to the coarsest resolution and up again, until only the skip connections of the finest are left."""
        for block in blocks:
            x = block(x, steering, skips)
        x = self.mid_block(x, steering)
        for block in self.up_blocks[:-1]:
            x = block(x, skips, steering)
        return x

    def _read_time(self, timesteps: Tensor, dtype: torch.dtype, rows: Tensor | None) -> Mapping[nn.Module, Tensor]:
        """What the time adds in each residual block, with the bias of the convolution before it."""
        embedding = self.time_embedding(sinusoidal_embedding(timesteps, self.conv_in.out_channels).to(dtype))
        if rows is not None:
            embedding = embedding[rows]
        weight, bias = self._time_projection() if self.time_weight is None else (self.time_weight, self.time_bias)
        offsets = F.linear(F.silu(embedding), weight, bias)
        blocks = self._resnets
        return dict(zip(blocks, torch.split(offsets, _channels(blocks), dim=1), strict=True))

    def _time_projection(self) -> tuple[Tensor, Tensor]:
        """Of all residual blocks: (sum of their channels, d) and (sum of their channels,)."""
        weights, biases = [], []
        for block in self._resnets:
            assert block.time_emb_proj is not None
            assert block.conv1.bias is not None
            weights.append(block.time_emb_proj.weight)
            biases.append(block.time_emb_proj.bias + block.conv1.bias)
        return torch.cat(weights), torch.cat(biases)


def _channels(blocks: list[ResnetBlock]) -> list[int]:
    return [block.conv1.out_channels for block in blocks]


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

    def layer(self, i: int, x: Tensor, steering: _Steering, skip: Tensor | None = None) -> Tensor:
        """The i-th of each kind, one after the other."""
        convolved: Sum = self.resnets[i](x, skip, steering.time[self.resnets[i]][: len(x)])
        convolved = self.temp_convs[i](convolved)
        if i >= len(self.attentions):
            return total(convolved)
        attention = self.attentions[i]
        attended: Sum = attention(convolved, steering.text[attention], self.missing_rows(x, steering))
        attended = self.temp_attentions[i](attended)
        return total(attended)

    def missing_rows(self, x: Tensor, steering: _Steering) -> Tensor | None:
        """The rows to spread x to, where it still has one for each sample; None where it has them all."""
        return steering.rows if steering.rows is not None and len(x) < len(steering.rows) else None


class DownBlock(_Layers):
    """One resolution on the way down. It leaves each layer's output to the way up, at the end of `skips`."""

    def __init__(
        self, config: UNetConfig, in_channels: list[int], out_channels: int, *, attention: bool, downsample: bool
    ) -> None:
        super().__init__(config, in_channels, out_channels, len(in_channels) if attention else 0)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(self, x: Tensor, steering: _Steering, skips: list[Tensor]) -> Tensor:
        return self.downsample(self.layers(x, steering, skips), skips)

    def layers(self, x: Tensor, steering: _Steering, skips: list[Tensor]) -> Tensor:
        """All of it at its own resolution."""
        for i in range(len(self.resnets)):
            x = self.layer(i, x, steering)
            skips.append(x)
        return x

    def downsample(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """On to the next resolution, if there is one."""
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(_Layers):
    """The coarsest resolution: attention between two residual blocks."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__(config, [channels, channels], channels, num_attentions=1)

    def forward(self, x: Tensor, steering: _Steering) -> Tensor:
        return self.layer(1, self.layer(0, x, steering), steering)


class UpBlock(_Layers):
    """One resolution on the way up. Each layer takes one skip connection off the end of the list."""

    def __init__(
        self, config: UNetConfig, in_channels: list[int], out_channels: int, *, attention: bool, upsample: bool
    ) -> None:
        super().__init__(config, in_channels, out_channels, len(in_channels) if attention else 0)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], steering: _Steering) -> Tensor:
        for i in range(len(self.resnets)):
            skip = skips.pop()
            rows = self.missing_rows(skip, steering)
            x = self.layer(i, x, steering, skip if rows is None else skip[rows])
        for upsample in self.upsamplers:
            # Not simply twice the size: a side that was odd before it was halved must meet its skip connection.
            height, width = skips[-1].shape[2:4]
            x = total(upsample(x, (height, width)))
        return x
