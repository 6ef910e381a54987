"""The operations in plain PyTorch: on any device, in any precision, differentiable."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from t2v_core.kernels.fp8 import FP8, scale_of, to_fp8


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
    """GroupNorm (Wu and He 2018) of x + offset or, with a skip connection, of x and it side by side; then SiLU.

    x: (b, f, h, w, c), skip: (b, f, h, w, c2), offset: (b or 1, c) -> (b, f, h, w, c + c2), of x's type or `dtype`.
    Statistics are of each frame or, with `over_frames`, of all frames together. `unfold`: see `unfolded`.
    """
    if offset is not None:
        x = x + offset[:, None, None, None, :]
    if skip is not None:
        x = torch.cat([x, skip], dim=-1)
    split, merged = ("b c f h w", "b f h w c") if over_frames else ("(b f) c h w", "b f h w c")
    y = norm(rearrange(x, f"{merged} -> {split}"))
    y = rearrange(y, f"{split} -> {merged}", b=len(x)).contiguous()
    y = _as(F.silu(y) if silu else y, dtype)
    return unfolded(y) if unfold else y


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
    """x + delta + offset, and the GroupNorm of that; see `add` and `group_norm`."""
    x = add(x, delta, offset)
    return x, group_norm(x, norm, over_frames=over_frames, silu=silu, dtype=dtype, unfold=unfold)


def group_norm_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, *, delta: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """A convolution of every frame, of the SiLU of the GroupNorm of x + delta + offset; see `add` and `group_norm`.

    x, delta: (b, f, h, w, c), offset: (c,) -> (b, f, h, w, c2). Statistics are of each frame.
    """
    if delta is not None:
        x = add(x, delta, offset)
    frames = rearrange(group_norm(x, norm, over_frames=False, silu=True), "b f h w c -> (b f) c h w")
    out = F.conv2d(frames, conv.weight, conv.bias, conv.stride, conv.padding)
    return rearrange(out, "(b f) c h w -> b f h w c", b=len(x)).contiguous()


def layer_norm(x: Tensor, norm: nn.LayerNorm, offset: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm of x + offset over the last dimension. x: (..., c), offset: (c,) -> as x, of its type or `dtype`."""
    return _as(norm(x + offset), dtype)


def add_layer_norm(
    x: Tensor,
    delta: Tensor,
    offset: Tensor,
    norm: nn.LayerNorm,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + delta + offset, and the LayerNorm of that, of x's type or `dtype`; see `add`.

    The sum is written to `out`, if given, whose rows may lie apart, and whose type may be another.
    """
    x = x + (delta + offset)
    return x if out is None else out.copy_(_as(x, out.dtype)), _as(norm(x), dtype)


def add(x: Tensor, delta: Tensor, offset: Tensor | None = None) -> Tensor:
    """x + delta + offset. x, delta: (..., c), offset: (c,)."""
    return x + delta if offset is None else x + (delta + offset)


def join_quarters(corners: Tensor, bias: Tensor) -> Tensor:
    """Of every pixel's four corners, the quarter that is in the pixel, as an image of twice the height and width.

    corners: (b, f, h + 1, w + 1, 4 c), with the quarters (row, column) of a corner one after the other, bias: (c,)
    -> (b, f, 2 h, 2 w, c).
    """
    quarters = rearrange(corners, "b f h w (p q c) -> p q b f h w c", p=2, q=2)
    h, w = corners.shape[2] - 1, corners.shape[3] - 1
    rows = [torch.stack([quarters[p, q, :, :, p : p + h, q : q + w] for q in range(2)]) for p in range(2)]
    return rearrange(torch.stack(rows) + bias, "p q b f h w c -> b f (h p) (w q) c").contiguous()


def join_quarters_group_norm(
    corners: Tensor, bias: Tensor, norm: nn.GroupNorm, *, silu: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The image that has these quarters, and the GroupNorm of each of its frames; see `join_quarters`, `group_norm`."""
    x = join_quarters(corners, bias)
    return x, group_norm(x, norm, over_frames=False, silu=silu, dtype=dtype)


def conv_frames(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution of every frame that keeps its size, without a bias. x: (b, f, h, w, c), weight: (c2, c, k, k).

    Both may be in fp8, the weight as `fp8.quantised` gives it. The result is of type `dtype`.
    """
    weight = _weight(weight, dtype) if weight.dtype == FP8 else weight
    return _conv(x.to(dtype), weight, padding=weight.shape[-1] // 2)


def conv_corners(x: Tensor, weight: Tensor) -> Tensor:
    """A 2x2 convolution around every corner of the pixels of each frame, without a bias.

    x: (b, f, h, w, c), weight: (c2, c, 2, 2) -> (b, f, h + 1, w + 1, c2).
    """
    return _conv(x, weight, padding=1)


def conv_over_time(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A convolution over the frames of every pixel, without a bias. x: (b, f, h, w, c), weight: (c2, c, 3, 1, 1).

    Both may be in fp8, the weight as `fp8.quantised` gives it; then the result is of type `dtype`. x may be `unfolded`.
    """
    if x.shape[-1] != weight.shape[1]:
        return F.linear(x, weight.movedim(1, -1).flatten(1))
    if dtype is not None and weight.dtype == FP8:
        x, weight = x.to(dtype), _weight(weight, dtype)
    if x.is_cuda:  # whose library chooses better kernels for this than for the same in two dimensions
        return _conv_in_3d(x, weight, (1, 0, 0))
    out = F.conv2d(rearrange(x, "b f h w c -> b c f (h w)"), weight.squeeze(-1), padding=(1, 0))
    return rearrange(out, "b c f (h w) -> b f h w c", h=x.shape[2]).contiguous()


def unfolded(x: Tensor) -> Tensor:
    """Every frame beside the one before it and the one after, or zeros: what each row of a convolution over time reads.

    (b, f, h, w, c) -> (b, f, h, w, 3 c).
    """
    f = x.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1))
    return torch.cat([padded[:, tap : tap + f] for tap in range(3)], dim=-1)


def geglu(x: Tensor, proj: nn.Linear, out: Tensor | None = None) -> Tensor:
    """A linear layer gated by the (erf) GELU of its other half (Shazeer 2020).

    x: (..., d) -> (..., proj's out / 2), written to `out`, if given, whose rows may lie apart. x and the weight may be
    in fp8, the weight as `fp8.quantised` gives it, and so may `out`.
    """
    both = linear(x, proj.weight, proj.bias.dtype) + proj.bias if proj.weight.dtype == FP8 else proj(x)
    value, gate = both.chunk(2, dim=-1)
    gated = value * F.gelu(gate)
    return gated if out is None else out.copy_(_as(gated, out.dtype))


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A product without a bias. x: (..., d), weight: (d2, d) -> (..., d2).

    Both may be in fp8, the weight as `fp8.quantised` gives it; then the result is of type `dtype`.
    """
    return F.linear(x.to(dtype), _weight(weight, dtype)) if weight.dtype == FP8 else F.linear(x, weight)


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention between the frames at each pixel.

    qkv: (b, f, h, w, 3 heads d), queries, keys and values side by side -> (b, f, h, w, heads d).
    """
    b, _, h, w, _ = qkv.shape
    q, k, v = rearrange(qkv, "b f h w (three heads d) -> three (b h w) heads f d", three=3, heads=heads)
    attended = F.scaled_dot_product_attention(q, k, v)
    return rearrange(attended, "(b h w) heads f d -> b f h w (heads d)", b=b, h=h, w=w).contiguous()


def spatial_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention between the pixels of each frame. Shapes as in `temporal_attention`."""
    b, _, h, _, _ = qkv.shape
    q, k, v = rearrange(qkv, "b f h w (three heads d) -> three (b f) heads (h w) d", three=3, heads=heads)
    attended = F.scaled_dot_product_attention(q, k, v)
    return rearrange(attended, "(b f) heads (h w) d -> b f h w (heads d)", b=b, h=h)


def text_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of each pixel of each frame to the tokens of its text.

    queries: (b, f, h, w, heads d), keys and values: (b, heads, m, d) -> (b, f, h, w, heads d).
    """
    _, f, h, _, _ = queries.shape
    queries = rearrange(queries, "b f h w (heads d) -> b heads (f h w) d", heads=keys.shape[1])
    attended = F.scaled_dot_product_attention(queries, keys, values)
    return rearrange(attended, "b heads (f h w) d -> b f h w (heads d)", f=f, h=h)


def single_head_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of all tokens of a sequence to each other, by one head. Each (n, tokens, c) -> (n, tokens, c)."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def sampler_update(
    latents: Tensor, eps: Tensor, history: Tensor, noise: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """See `samplers.update`. All are of one type."""
    alpha, sigma, a, b0, b1, b2, c = rearrange(rows, "b k -> k b 1 1 1 1")
    x0 = (latents - sigma * eps) / alpha
    newest, older = history.unbind(1)
    latents = a * latents + b0 * x0 + b1 * newest + b2 * older
    if noise is not None:
        latents = latents + c * noise
    return latents, torch.stack([x0, newest], dim=1)


def _conv(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """Of every frame, in that of a GPU library's two ways for which it chooses better kernels."""
    if x.is_cuda and _is_faster_in_3d(x, weight):
        return _conv_in_3d(x, weight.unsqueeze(2), (0, padding, padding))
    out = F.conv2d(rearrange(x, "b f h w c -> (b f) c h w"), weight, padding=padding)
    return rearrange(out, "(b f) c h w -> b f h w c", b=len(x)).contiguous()


def _conv_in_3d(x: Tensor, weight: Tensor, padding: tuple[int, int, int]) -> Tensor:
    out = F.conv3d(rearrange(x, "b f h w c -> b c f h w"), weight, padding=padding)
    return rearrange(out, "b c f h w -> b f h w c").contiguous()


def _is_faster_in_3d(x: Tensor, weight: Tensor) -> bool:
    """Found on an H200, with torch 2.11: 0.63 instead of 1.53 ms for corners of 48 frames of 9x16 and 1280 channels,
    1.35 instead of 1.49 for 256 of 16x16 and 640; 109 us instead of 204 for the pixels of 48 of 5x9 and 1280.
    """
    _, _, h, w, channels = x.shape
    if weight.shape[-1] == 2:
        return channels >= 640
    return len(weight) >= 1280 and (h % 2 == 1 or w % 2 == 1)


def _as(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return x
    return to_fp8(x) if dtype == FP8 else x.to(dtype)


def _weight(quantised: Tensor, dtype: torch.dtype) -> Tensor:
    return quantised.to(dtype) * scale_of(quantised)
