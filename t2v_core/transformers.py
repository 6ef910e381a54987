"""Transformers: attention between pixels, between frames, and to the text; and the feed-forward after it.

Names and shapes are as in `layers`, and n tokens, d width of the text.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from t2v_core.kernels import geglu, linear, linear_norm, spatial_attention, temporal_attention, text_attention
from t2v_core.kernels.fp8 import dtype_for, quantise, quantised
from t2v_core.layers import Sum, summed_and_normed

KeysValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Multi-head attention of tokens to each other, or to a context.

    Its first and last products are left to what comes before and after it: see `kernels.linear_norm`.
    """

    fused: Tensor | None

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        inner_dim = heads * head_dim
        self.heads, self._has_context = heads, context_dim is not None
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, dim))
        self.register_buffer("fused", None, persistent=False)

    @property
    def last(self) -> nn.Linear:
        """The last layer."""
        last = self.to_out[0]
        assert isinstance(last, nn.Linear)
        return last

    @property
    def first_weight(self) -> Tensor:
        """Of queries, keys and values side by side or, with a context, of queries. (c2, c)"""
        if self._has_context:
            return self.to_q.weight
        if self.fused is not None:
            return self.fused
        return torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])

    def fuse(self) -> None:
        """Lay the three projections of one input side by side, for one product. Their names stay, as parts of it."""
        if not self._has_context:
            self._set_fused(torch.cat([layer.weight.detach() for layer in (self.to_q, self.to_k, self.to_v)]))

    def quantise(self) -> None:
        """Let the projections of x have fp8: of a context, there are too few for it to matter."""
        if self.fused is None:
            quantise(self.to_q)
        else:
            self._set_fused(*quantised(self.fused))

    def _set_fused(self, fused: Tensor) -> None:
        self.fused = fused
        for projection, part in zip((self.to_q, self.to_k, self.to_v), fused.chunk(3), strict=True):
            projection.weight = nn.Parameter(part, requires_grad=False)

    def keys_values(self, context: Tensor) -> KeysValues:
        """What queries find in a context, (b, m, d): two of (b, heads, m, c)."""
        return self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context))

    def over_pixels(self, qkv: Tensor) -> Tensor:
        """Each pixel of a frame to all of them. qkv: (b, f, h, w, 3 c) -> (b, f, h, w, c)."""
        return spatial_attention(qkv, self.heads)

    def over_frames(self, qkv: Tensor) -> Tensor:
        """Each frame of a pixel to all of them. qkv: (b, f, h, w, 3 c) -> (b, f, h, w, c)."""
        return temporal_attention(qkv, self.heads)

    def to_text(self, queries: Tensor, text: KeysValues) -> Tensor:
        """Each pixel of each frame to the tokens of its text, which they share. queries: (b, f, h, w, c), same out."""
        return text_attention(queries, *text)

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (heads c) -> b heads n c", heads=self.heads)


class GEGLU(nn.Module):
    """A linear layer gated by the (erf) GELU of its other half (Shazeer 2020)."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim * 2)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return geglu(x, self.proj, out)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Dropout(0.0), nn.Linear(dim * 4, dim))

    @property
    def gate(self) -> GEGLU:
        """The first layer."""
        gate = self.net[0]
        assert isinstance(gate, GEGLU)
        return gate

    @property
    def last(self) -> nn.Linear:
        """The last layer."""
        last = self.net[2]
        assert isinstance(last, nn.Linear)
        return last

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Two attentions, then feed-forward: what spatial and temporal transformers are made of.

    Biases of products with nothing but a sum after them are added there: `before` is that of the layer before.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, head_dim, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def over_pixels(
        self, x: Tensor, weight: Tensor, biases: "_Biases", text: KeysValues, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each pixel to its frame, then to the text. x: (b, f, h, w, c), what `weight` projects.

        `rows`: see `SpatialTransformer`. Returns what `feed_forward` takes: the residual stream, and what the last
        attention has to add to it.
        """
        x, qkv = self._first(x, weight, biases)
        x, queries = self._second(x, self.attn1.over_pixels(qkv), biases)
        if rows is not None:
            x, queries = x[rows], queries[rows]
        return x, self.attn2.to_text(queries, text)

    def over_frames(self, x: Tensor, weight: Tensor, biases: "_Biases") -> tuple[Tensor, Tensor]:
        """Each frame of a pixel to the others, twice. As `over_pixels`."""
        x, qkv = self._first(x, weight, biases)
        x, qkv = self._second(x, self.attn1.over_frames(qkv), biases)
        return x, self.attn2.over_frames(qkv)

    def _first(self, x: Tensor, weight: Tensor, biases: "_Biases") -> tuple[Tensor, Tensor]:
        """The residual stream, and what the first attention reads."""
        return linear_norm(x, weight, biases.before, self.norm1, then=self.attn1.first_weight)

    def _second(self, x: Tensor, attended: Tensor, biases: "_Biases") -> tuple[Tensor, Tensor]:
        """The residual stream after the first attention, and what the second one reads."""
        weight, then = self.attn1.last.weight, self.attn2.first_weight
        return linear_norm(attended, weight, biases.after_attention, self.norm2, residual=x, then=then)

    def feed_forward(self, x: Tensor, attended: Tensor, proj_out: "OutProjection") -> tuple[Tensor, Tensor]:
        """What is left of the block, and the projection after it, and the bias of that, which is not added.

        x, attended: (..., c) -> (..., proj_out's), (proj_out's,)
        """
        last = self.attn2.last
        if proj_out.fused is None or proj_out.fused_bias is None:
            x, y = linear_norm(attended, last.weight, last.bias, self.norm3, residual=x)
            return F.linear(x + self.ff(y), proj_out.weight), proj_out.bias
        # Two linear layers without anything between them are one, of both parts of the sum beside each other.
        c = x.shape[-1]
        both = x.new_empty(*x.shape[:-1], c + self.ff.last.in_features, dtype=dtype_for(proj_out.fused))
        dtype = dtype_for(self.ff.gate.proj.weight)
        _, y = linear_norm(attended, last.weight, last.bias, self.norm3, residual=x, out=both[..., :c], dtype=dtype)
        self.ff.gate(y, out=both[..., c:])
        return linear(both, proj_out.fused, x.dtype), proj_out.fused_bias


class OutProjection(nn.Linear):
    """The last layer of a transformer. It can take in the last one of the feed-forward before it."""

    fused: Tensor | None
    fused_bias: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("fused", None, persistent=False)
        self.register_buffer("fused_bias", None, persistent=False)

    def fuse_after(self, last: nn.Linear) -> None:
        """P (x + W g + b) + p = [P, P W] [x, g] + (P b + p), in at least float32."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        p, w = self.weight.detach().to(exact), last.weight.detach().to(exact)
        self.fused = torch.cat([p, p @ w], dim=1).to(self.weight.dtype)
        self.fused_bias = (p @ last.bias.detach().to(exact) + self.bias.detach().to(exact)).to(self.weight.dtype)


class _Biases(NamedTuple):
    """Of the projection before a block, and of that and the first attention together. Both: (c,)."""

    before: Tensor
    after_attention: Tensor


class _Transformer(nn.Module):
    """What spatial and temporal transformers have in common: their parts."""

    fused_biases: Tensor | None

    def __init__(self, channels: int, *, heads: int, head_dim: int, groups: int, text_dim: int | None = None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, heads * head_dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(heads * head_dim, heads, head_dim, text_dim)])
        self.proj_out = OutProjection(heads * head_dim, channels)
        self.register_buffer("fused_biases", None, persistent=False)

    @property
    def block(self) -> TransformerBlock:
        """The only one."""
        (block,) = self.transformer_blocks
        assert isinstance(block, TransformerBlock)
        return block

    @property
    def biases(self) -> _Biases:
        """What the block adds for products that did not."""
        before, fused = self.proj_in.bias, self.fused_biases
        return _Biases(before, before + self.block.attn1.last.bias if fused is None else fused)

    def quantise(self) -> None:
        """Let the feed-forward have fp8, after `fuse`. The projection before the block gains little, and errs most."""
        assert self.proj_out.fused is not None
        gate = self.block.ff.gate.proj
        self.proj_out.fused, weight = quantised(self.proj_out.fused, gate.weight)
        gate.weight = nn.Parameter(weight, requires_grad=False)

    def fuse(self) -> None:
        """Make the last two layers one, and add up biases."""
        self.proj_out.fuse_after(self.block.ff.last)
        self.fused_biases = self.biases.after_attention.detach()


class SpatialTransformer(_Transformer):
    """Attention between the pixels of a frame, and from them to the text."""

    def keys_values(self, text_embeds: Tensor) -> KeysValues:
        """What this layer reads in the text, (b, n, d): it does not depend on the latents."""
        return self.block.attn2.keys_values(text_embeds)

    def forward(self, x: Tensor | Sum, text: KeysValues, rows: Tensor | None = None) -> Sum:
        """x: (b, f, h, w, c), text: this layer's keys and values of it -> as x.

        Where several rows of text share a sample of x, `rows` says which: (b of the text,). The result has them all.
        """
        x, tokens = summed_and_normed(x, self.norm, over_frames=False, silu=False)
        tokens, attended = self.block.over_pixels(tokens, self.proj_in.weight, self.biases, text, rows)
        return Sum(x if rows is None else x[rows], *self.block.feed_forward(tokens, attended, self.proj_out))


class TemporalTransformer(_Transformer):
    """Attention between the frames at each pixel. It has no positions: order comes from the convolutions."""

    def forward(self, x: Tensor | Sum) -> Sum:
        """x: (b, f, h, w, c), same shape out. Normalisation spans all frames."""
        x, tokens = summed_and_normed(x, self.norm, over_frames=True, silu=False)
        tokens, attended = self.block.over_frames(tokens, self.proj_in.weight, self.biases)
        return Sum(x, *self.block.feed_forward(tokens, attended, self.proj_out))
