"""Each operation by Triton on a GPU, and in plain PyTorch where that cannot be."""

import importlib.util

import torch
from torch import Tensor, nn

from t2v_core.kernels import plain

_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # torch brings it on Linux
_HOPPER = (9, 0)  # the first with a copy engine for boxes of tensors
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    *,
    over_frames: bool,
    silu: bool,
    offset: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """As `plain.group_norm`, in one read and one write where a group fits into a processor, and in two reads else."""
    if not _runs_triton(x):
        return plain.group_norm(x, norm, over_frames=over_frames, silu=silu, offset=offset, skip=skip)
    from t2v_core.kernels import triton_group_norm as fast

    return fast.group_norm(x, norm, over_frames=over_frames, silu=silu, offset=offset, skip=skip)


def add_group_norm(
    x: Tensor, delta: Tensor, offset: Tensor | None, norm: nn.GroupNorm, *, over_frames: bool, silu: bool
) -> tuple[Tensor, Tensor]:
    """As `plain.add_group_norm`, with the sum read once less."""
    if not _runs_triton(x):
        return plain.add_group_norm(x, delta, offset, norm, over_frames=over_frames, silu=silu)
    from t2v_core.kernels import triton_group_norm as fast

    return fast.add_group_norm(x, delta, offset, norm, over_frames=over_frames, silu=silu)


def layer_norm(x: Tensor, norm: nn.LayerNorm, offset: Tensor) -> Tensor:
    """As `plain.layer_norm`."""
    if not _runs_triton(x):
        return plain.layer_norm(x, norm, offset)
    from t2v_core.kernels import triton_rows as fast

    return fast.layer_norm(x, norm, offset)


def add_layer_norm(
    x: Tensor, delta: Tensor, offset: Tensor, norm: nn.LayerNorm, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `plain.add_layer_norm`, with the sum read no second time."""
    if not _runs_triton(x):
        return plain.add_layer_norm(x, delta, offset, norm, out)
    from t2v_core.kernels import triton_rows as fast

    return fast.add_layer_norm(x, delta, offset, norm, out)


def join_quarters(corners: Tensor, bias: Tensor) -> Tensor:
    """As `plain.join_quarters`, in one pass."""
    if not _runs_triton(corners):
        return plain.join_quarters(corners, bias)
    from t2v_core.kernels import triton_rows as fast

    return fast.join_quarters(corners, bias)


def add(x: Tensor, delta: Tensor, offset: Tensor | None = None) -> Tensor:
    """As `plain.add`, at once."""
    if offset is None or not _runs_triton(x):
        return plain.add(x, delta, offset)
    from t2v_core.kernels import triton_rows as fast

    return fast.add(x, delta, offset)


def conv_over_time(x: Tensor, weight: Tensor) -> Tensor:
    """As `plain.conv_over_time`, where a kernel of our own is faster than the library's."""
    if not _runs_triton(x) or torch.cuda.get_device_capability(x.device) < _HOPPER:
        return plain.conv_over_time(x, weight)
    from t2v_core.kernels import triton_conv_over_time as fast

    return fast.conv_over_time(x, weight) if fast.pays(x, weight) else plain.conv_over_time(x, weight)


def geglu(x: Tensor, proj: nn.Linear, out: Tensor | None = None) -> Tensor:
    """As `plain.geglu`, with the gate applied before anything is written."""
    if not _runs_triton(x) or torch.cuda.get_device_capability(x.device) < _HOPPER:
        return plain.geglu(x, proj, out)
    from t2v_core.kernels import triton_geglu as fast

    return fast.geglu(x, proj, out) if fast.fits(x, proj) else plain.geglu(x, proj, out)


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """As `plain.temporal_attention`, each number read once from where the projection left it."""
    if not _runs_triton(qkv):
        return plain.temporal_attention(qkv, heads)
    from t2v_core.kernels import triton_temporal_attention as fast

    return fast.temporal_attention(qkv, heads) if fast.fits(qkv, heads) else plain.temporal_attention(qkv, heads)


def _runs_triton(x: Tensor) -> bool:
    return x.is_cuda and _IS_INSTALLED and x.dtype in _DTYPES and not torch.is_grad_enabled()
