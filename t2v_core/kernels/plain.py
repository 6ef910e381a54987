"""The operations in plain PyTorch: on any device, in any precision, differentiable."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    *,
    over_frames: bool,
    silu: bool,
    offset: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """GroupNorm (Wu and He 2018) of x + offset or, with a skip connection, of x and it side by side; then SiLU.

    x: (b, f, h, w, c), skip: (b, f, h, w, c2), offset: (b or 1, c) -> (b, f, h, w, c + c2).
    Statistics are of each frame or, with `over_frames`, of all frames together.
    """
    if offset is not None:
        x = x + offset[:, None, None, None, :]
    if skip is not None:
        x = torch.cat([x, skip], dim=-1)
    split, merged = ("b c f h w", "b f h w c") if over_frames else ("(b f) c h w", "b f h w c")
    y = norm(rearrange(x, f"{merged} -> {split}"))
    y = rearrange(y, f"{split} -> {merged}", b=len(x)).contiguous()
    return F.silu(y) if silu else y


def add_group_norm(
    x: Tensor, delta: Tensor, offset: Tensor | None, norm: nn.GroupNorm, *, over_frames: bool, silu: bool
) -> tuple[Tensor, Tensor]:
    """x + delta + offset, and the GroupNorm of that; see `add` and `group_norm`."""
    x = add(x, delta, offset)
    return x, group_norm(x, norm, over_frames=over_frames, silu=silu)


def layer_norm(x: Tensor, norm: nn.LayerNorm, offset: Tensor) -> Tensor:
    """LayerNorm of x + offset over the last dimension. x: (..., c), offset: (c,)."""
    return norm(x + offset)


def add_layer_norm(
    x: Tensor, delta: Tensor, offset: Tensor, norm: nn.LayerNorm, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + delta + offset, and the LayerNorm of that; see `add`.

    The sum is written to `out`, if given, whose rows may lie apart.
    """
    x = torch.add(x, delta + offset, out=out)
    return x, norm(x)


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


def conv_over_time(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution over the frames of every pixel, without a bias. x: (b, f, h, w, c), weight: (c2, c, 3, 1, 1)."""
    if x.is_cuda:  # whose library chooses better kernels for this than for the same in two dimensions
        out = F.conv3d(rearrange(x, "b f h w c -> b c f h w"), weight, padding=(1, 0, 0))
        return rearrange(out, "b c f h w -> b f h w c").contiguous()
    out = F.conv2d(rearrange(x, "b f h w c -> b c f (h w)"), weight.squeeze(-1), padding=(1, 0))
    return rearrange(out, "b c f (h w) -> b f h w c", h=x.shape[2]).contiguous()


def geglu(x: Tensor, proj: nn.Linear, out: Tensor | None = None) -> Tensor:
    """A linear layer gated by the (erf) GELU of its other half (Shazeer 2020).

    x: (..., d) -> (..., proj's out / 2), written to `out`, if given, whose rows may lie apart.
    """
    value, gate = proj(x).chunk(2, dim=-1)
    return torch.mul(value, F.gelu(gate), out=out)


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention between the frames at each pixel.

    qkv: (b, f, h, w, 3 heads d), queries, keys and values side by side -> (b, f, h, w, heads d).
    """
    b, _, h, w, _ = qkv.shape
    q, k, v = rearrange(qkv, "b f h w (three heads d) -> three (b h w) heads f d", three=3, heads=heads)
    attended = F.scaled_dot_product_attention(q, k, v)
    return rearrange(attended, "(b h w) heads f d -> b f h w (heads d)", b=b, h=h, w=w).contiguous()
