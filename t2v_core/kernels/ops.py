"""Each operation by Triton on a GPU, and in plain PyTorch where that cannot be."""

import importlib
import importlib.util
import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v_core.kernels import plain
from t2v_core.kernels.first_results import FirstResults, ends_of_frames, ends_of_pixels, ends_of_rows
from t2v_core.kernels.fp8 import FP8, dtype_for, scale_of

logger = logging.getLogger(__name__)
_first_results = FirstResults()

_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # torch brings it on Linux
HOPPER = (9, 0)  # compute capability of the first with a copy engine for boxes of tensors
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, FP8)
# The four norms and convolutions over time of 16 frames of 4x4 pixels and 1280 channels take an H200 71 us instead of
# 104 for 2 rows, 151 instead of 173 for 6, and 178 instead of 163 for 8.
_MOST_UNFOLDED_ROWS = 1536
_SCALED_PRODUCT_SIZES = 16  # whose multiples torch's product in fp8 takes


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
    """As `plain.group_norm`, in one read and one write where a group fits into a processor, and in two reads else."""
    assert skip is None or offset is None, "an offset is of x's channels alone"
    if not _runs_triton(x):
        return plain.group_norm(
            x, norm, over_frames=over_frames, silu=silu, offset=offset, skip=skip, dtype=dtype, unfold=unfold
        )
    from t2v_core.kernels import triton_group_norm as fast

    return fast.group_norm(
        x, norm, over_frames=over_frames, silu=silu, offset=offset, skip=skip, dtype=dtype, unfold=unfold
    )


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
    """As `plain.add_group_norm`, with the sum read once less."""
    if not _runs_triton(x):
        return plain.add_group_norm(
            x, delta, offset, norm, over_frames=over_frames, silu=silu, dtype=dtype, unfold=unfold
        )
    from t2v_core.kernels import triton_group_norm as fast

    return fast.add_group_norm(x, delta, offset, norm, over_frames=over_frames, silu=silu, dtype=dtype, unfold=unfold)


def group_norm_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, *, delta: Tensor | None = None, offset: Tensor | None = None
) -> Tensor:
    """As `plain.group_norm_conv`, by kernels for few channels out, which hardly occupy the library's."""
    assert offset is None or delta is not None, "an offset belongs to a delta"
    if _runs_triton(x):
        from t2v_core.kernels import triton_norm_conv as fast

        if fast.fits(conv):
            return fast.group_norm_conv(x, norm, conv, delta=delta, offset=offset)
    return plain.group_norm_conv(x, norm, conv, delta=delta, offset=offset)


def layer_norm(x: Tensor, norm: nn.LayerNorm, offset: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `plain.layer_norm`."""
    if not _runs_triton(x):
        return plain.layer_norm(x, norm, offset, dtype)
    from t2v_core.kernels import triton_rows as fast

    return fast.layer_norm(x, norm, offset, dtype)


def add_layer_norm(
    x: Tensor,
    delta: Tensor,
    offset: Tensor,
    norm: nn.LayerNorm,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """As `plain.add_layer_norm`, with the sum read no second time."""
    if not _runs_triton(x):
        return plain.add_layer_norm(x, delta, offset, norm, out, dtype)
    from t2v_core.kernels import triton_rows as fast

    return fast.add_layer_norm(x, delta, offset, norm, out, dtype)


def linear_norm(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    norm: nn.LayerNorm,
    *,
    residual: Tensor | None = None,
    then: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A product, the sum with what it is added to, and the LayerNorm of that or, with `then`, a product of the norm.

    x: (..., d), weight: (c, d), offset: (c,), residual: (..., c), then: (c2, c)
    -> residual + x weight^T + offset, (..., c), and (..., c) or, with `then`, (..., c2).

    Without `residual`, the first result is the product alone, and the norm is that of it with the offset. `out`, which
    goes with a residual, and `dtype`, which goes without `then`, are as in `plain.add_layer_norm`; `then` may be in
    fp8, as in `plain.linear`.
    """
    assert residual is not None or out is None
    assert then is None or dtype is None
    if _runs_gluon(x) and dtype is None:
        from t2v_core.kernels import gluon_linear_norm as fast

        if fast.pays(x, weight, then):

            def expected() -> tuple[Tensor, Tensor]:
                added = None if residual is None else ends_of_rows(residual)
                return _linear_norm(ends_of_rows(x), weight, offset, norm, added, then, None, None)

            results = _first_results.call(
                ("linear_norm", x.device, x.dtype, residual is None, None if then is None else len(then)),
                lambda: fast.linear_norm(x, weight, offset, norm, residual=residual, then=then, out=out),
                lambda results: list(zip(map(ends_of_rows, results), expected(), strict=True)),
            )
            if results is not None:
                return results
    return _linear_norm(x, weight, offset, norm, residual, then, out, dtype)


def _linear_norm(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    norm: nn.LayerNorm,
    residual: Tensor | None,
    then: Tensor | None,
    out: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """One after the other."""
    product = F.linear(x, weight)
    dtype = dtype if then is None else dtype_for(then)
    if residual is None:
        total, y = product, layer_norm(product, norm, offset, dtype)
    else:
        total, y = add_layer_norm(residual, product, offset, norm, out, dtype)
    return total, y if then is None else linear(y, then, weight.dtype)


def join_quarters(corners: Tensor, bias: Tensor) -> Tensor:
    """As `plain.join_quarters`, in one pass."""
    if not _runs_triton(corners):
        return plain.join_quarters(corners, bias)
    from t2v_core.kernels import triton_rows as fast

    return fast.join_quarters(corners, bias)


def join_quarters_group_norm(
    corners: Tensor, bias: Tensor, norm: nn.GroupNorm, *, silu: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """As `plain.join_quarters_group_norm`, with the image read once less."""
    if not _runs_triton(corners):
        return plain.join_quarters_group_norm(corners, bias, norm, silu=silu, dtype=dtype)
    from t2v_core.kernels import triton_group_norm as fast

    return fast.join_quarters_group_norm(corners, bias, norm, silu=silu, dtype=dtype)


def add(x: Tensor, delta: Tensor, offset: Tensor | None = None) -> Tensor:
    """As `plain.add`, at once."""
    if offset is None or not _runs_triton(x):
        return plain.add(x, delta, offset)
    from t2v_core.kernels import triton_rows as fast

    return fast.add(x, delta, offset)


def conv_frames(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As `plain.conv_frames`, where a kernel of our own is faster than the library's."""
    if _runs_gluon(x):
        from t2v_core.kernels import gluon_conv as faster

        if faster.pays(x, weight):
            pieces = faster.pieces_for(x, weight)
            result = _first_results.call(
                ("conv_frames", x.device, x.dtype, pieces),
                lambda: faster.conv_frames(x, weight, pieces),
                lambda result: [(ends_of_frames(result), plain.conv_frames(ends_of_frames(x), weight, dtype))],
            )
            if result is not None:
                return result
    if x.dtype != FP8 or not _has_copy_engine(x):
        return plain.conv_frames(x, weight, dtype)
    from t2v_core.kernels import triton_conv as fast

    return fast.conv_frames(x, weight, dtype) if fast.fits(x, weight) else plain.conv_frames(x, weight, dtype)


def unfolds_over_time(x: Tensor, norm: nn.GroupNorm, weight: Tensor) -> bool:
    """Whether a convolution over time is faster as a product of what the norm before it has unfolded.

    x: (b, f, h, w, c), which is to be normed over all frames, weight: (c2, c, 3, 1, 1).
    """
    if not _runs_triton(x) or x.numel() // x.shape[-1] > _MOST_UNFOLDED_ROWS:
        return False
    from t2v_core.kernels import triton_group_norm as fast

    is_in_place = weight.is_contiguous(memory_format=torch.channels_last_3d)
    return x.dtype == weight.dtype and is_in_place and fast.unfolds(x, norm)


def conv_over_time(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `plain.conv_over_time`, where a kernel of our own is faster than the library's."""
    if x.shape[-1] != weight.shape[1]:
        return plain.conv_over_time(x, weight, dtype)
    if _runs_gluon(x):
        from t2v_core.kernels import gluon_conv as faster

        if faster.pays(x, weight):
            pieces = faster.pieces_for(x, weight)
            result = _first_results.call(
                ("conv_over_time", x.device, x.dtype, pieces),
                lambda: faster.conv_over_time(x, weight, pieces),
                lambda result: [(ends_of_pixels(result), plain.conv_over_time(ends_of_pixels(x), weight))],
            )
            if result is not None:
                return result
    if not _has_copy_engine(x):
        return plain.conv_over_time(x, weight, dtype)
    from t2v_core.kernels import triton_conv as fast

    return fast.conv_over_time(x, weight, dtype) if fast.pays(x, weight) else plain.conv_over_time(x, weight, dtype)


def geglu(x: Tensor, proj: nn.Linear, out: Tensor | None = None) -> Tensor:
    """As `plain.geglu`, with the gate applied before anything is written."""
    if _runs_gluon(x):
        from t2v_core.kernels import gluon_geglu as faster

        if faster.pays(x, proj):
            result = _first_results.call(
                ("geglu", x.device, x.dtype, proj.in_features),
                lambda: faster.geglu(x, proj, out),
                lambda result: [(ends_of_rows(result), plain.geglu(ends_of_rows(x), proj))],
            )
            if result is not None:
                return result
    if not _has_copy_engine(x):
        return plain.geglu(x, proj, out)
    from t2v_core.kernels import triton_geglu as fast

    return fast.geglu(x, proj, out) if fast.fits(x, proj) else plain.geglu(x, proj, out)


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As `plain.linear`."""
    if weight.dtype != FP8:
        return F.linear(x, weight)
    if not _has_copy_engine(x) or any(size % _SCALED_PRODUCT_SIZES for size in weight.shape):
        return plain.linear(x, weight, dtype)
    one, scale = _scalar(1.0, x.device), _scalar(scale_of(weight), x.device)
    rows = x.flatten(0, -2)
    out = torch._scaled_mm(rows, weight.t(), one, scale, out_dtype=dtype, use_fast_accum=True)
    return out.unflatten(0, x.shape[:-1])


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """As `plain.temporal_attention`, each number read once from where the projection left it."""
    if _runs_triton(qkv):
        from t2v_core.kernels import triton_short_attention as fast

        if fast.fits(qkv, heads, tokens=qkv.shape[1]):
            return fast.temporal_attention(qkv, heads)
    return plain.temporal_attention(qkv, heads)


def spatial_attention(qkv: Tensor, heads: int) -> Tensor:
    """As `plain.spatial_attention`, by a kernel of our own where the library's is slower: for many pixels or few."""
    if _runs_gluon(qkv):
        from t2v_core.kernels import gluon_attention as faster

        if faster.pays(qkv, heads):
            result = _first_results.call(
                ("spatial_attention", qkv.device, qkv.dtype),
                lambda: faster.spatial_attention(qkv, heads),
                lambda result: [(ends_of_frames(result), plain.spatial_attention(ends_of_frames(qkv), heads))],
            )
            if result is not None:
                return result
    if _runs_triton(qkv):
        from t2v_core.kernels import triton_short_attention as fast

        if fast.fits(qkv, heads, tokens=qkv.shape[2] * qkv.shape[3]):
            return fast.spatial_attention(qkv, heads)
    return plain.spatial_attention(qkv, heads)


def text_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `plain.text_attention`, each number read once from where the projection left it."""
    if _runs_triton(queries):
        from t2v_core.kernels import triton_text_attention as fast

        if fast.fits(queries, keys, values):
            return fast.text_attention(queries, keys, values)
    return plain.text_attention(queries, keys, values)


def single_head_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `plain.single_head_attention`, by two products where the library has no fast kernels for such a head."""
    if _runs_triton(q):
        from t2v_core.kernels import triton_wide_attention as fast

        if fast.pays(q):
            return fast.single_head_attention(q, k, v)
    return plain.single_head_attention(q, k, v)


def sampler_update(
    latents: Tensor, eps: Tensor, history: Tensor, noise: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """As `plain.sampler_update`, at once."""
    if not _runs_triton(latents):
        return plain.sampler_update(latents, eps, history, noise, rows)
    from t2v_core.kernels import triton_sampler as fast

    return fast.sampler_update(latents, eps, history, noise, rows)


def _runs_triton(x: Tensor) -> bool:
    return x.is_cuda and _IS_INSTALLED and x.dtype in _DTYPES and not torch.is_grad_enabled()


def _has_copy_engine(x: Tensor) -> bool:
    return _runs_triton(x) and torch.cuda.get_device_capability(x.device) >= HOPPER


def _runs_gluon(x: Tensor) -> bool:
    return _runs_triton(x) and torch.cuda.get_device_capability(x.device) == HOPPER and _knows_gluon()


@cache
def _knows_gluon() -> bool:
    """Whether Triton's Gluon, which is experimental, still has what our kernels import."""
    try:
        for module in ("gluon_attention", "gluon_conv", "gluon_geglu", "gluon_linear_norm"):
            importlib.import_module(f"t2v_core.kernels.{module}")
    except (ImportError, AttributeError):
        logger.warning("this version of Triton has another Gluon: slower kernels are used", exc_info=True)
        return False
    return True


@cache
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)
