"""The building blocks of the networks: residual blocks, temporal convolutions, transformers.

Modules and parameters carry the names of the diffusers checkpoint layout, so weights load by name.
Letters in shapes: b batch, c channels, f frames, h height, w width, n tokens, d width of the text.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def each_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer for images to every frame. x: (b, c, f, h, w); the result has the layer's c, h and w."""
    b = x.shape[0]
    frames = layer(rearrange(x, "b c f h w -> (b f) c h w"))
    return rearrange(frames, "(b f) c h w -> b c f h w", b=b)


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

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """x: (b, c, h, w), time_embedding: (b, time_dim) -> (b, out_channels, h, w)."""
        residual = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            assert time_embedding is not None
            residual = residual + self.time_emb_proj(F.silu(time_embedding))[:, :, None, None]
        residual = self.conv2(F.silu(self.norm2(residual)))
        shortcut: Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + residual


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

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, c, f, h, w), same shape out."""
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))


KeysValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head attention of tokens to each other, or to a context."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        inner_dim = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, dim))

    def keys_values(self, context: Tensor) -> KeysValues:
        """What queries find in a context, (b, m, d): two of (b, heads, m, c)."""
        return self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context))

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        """x: (b, n, c); keys_values of a context, or None for those of x itself -> (b, n, c)."""
        k, v = self.keys_values(x) if keys_values is None else keys_values
        attended = F.scaled_dot_product_attention(self._split_heads(self.to_q(x)), k, v)
        return self.to_out(rearrange(attended, "b heads n c -> b n (heads c)"))

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (heads c) -> b heads n c", heads=self.heads)


class GEGLU(nn.Module):
    """A linear layer gated by the (erf) GELU of its other half (Shazeer 2020)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Dropout(0.0), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, then attention to the text (or self-attention again), then feed-forward."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, head_dim, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, text: KeysValues | None = None) -> Tensor:
        """x: (b s, n, c), s sequences of n tokens in each sample; text: attn2's keys and values of it -> as x."""
        x = x + self.attn1(self.norm1(x))
        if text is None:
            x = x + self.attn2(self.norm2(x))
        else:
            # All sequences of a sample read the same text: as one long row of queries they share its keys and values.
            queries = rearrange(self.norm2(x), "(b s) n c -> b (s n) c", b=len(text[0]))
            x = x + rearrange(self.attn2(queries, text), "b (s n) c -> (b s) n c", n=x.shape[1])
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention between the pixels of a frame, and from them to the text."""

    def __init__(self, channels: int, *, heads: int, head_dim: int, text_dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, heads * head_dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(heads * head_dim, heads, head_dim, text_dim)])
        self.proj_out = nn.Linear(heads * head_dim, channels)

    def keys_values(self, text_embeds: Tensor) -> KeysValues:
        """What this layer reads in the text, (b, n, d): it does not depend on the latents."""
        block = self.transformer_blocks[0]
        assert isinstance(block, TransformerBlock)
        return block.attn2.keys_values(text_embeds)

    def forward(self, x: Tensor, text: KeysValues) -> Tensor:
        """x: (b, c, f, h, w), text: this layer's keys and values of it -> as x."""
        b, _, _, h, w = x.shape
        tokens = rearrange(each_frame(self.norm, x), "b c f h w -> (b f) (h w) c")
        tokens = self.transformer_blocks[0](self.proj_in(tokens), text)
        return x + rearrange(self.proj_out(tokens), "(b f) (h w) c -> b c f h w", b=b, h=h, w=w)


class TemporalTransformer(nn.Module):
    """Attention between the frames at each pixel. It has no positions: order comes from the convolutions."""

    def __init__(self, channels: int, *, heads: int, head_dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, heads * head_dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(heads * head_dim, heads, head_dim)])
        self.proj_out = nn.Linear(heads * head_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, c, f, h, w), same shape out. Normalisation spans all frames."""
        b, _, _, h, w = x.shape
        tokens = rearrange(self.norm(x), "b c f h w -> (b h w) f c")
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        return x + rearrange(self.proj_out(tokens), "(b h w) f c -> b c f h w", b=b, h=h, w=w)


class Downsample(nn.Module):
    """Halve both sides, rounding up. x: (b, c, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Enlarge to a given size by the nearest neighbour, then smooth. x: (b, c, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
