"""A convolution over the frames of every pixel: a product whose rows are read three times, a frame apart.

For Hopper GPUs, whose copy engine fills in zeros for the frames before the first and after the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_BLOCK_M, _BLOCK_N, _BLOCK_K, _NUM_WARPS, _NUM_STAGES = 128, 128, 64, 4, 3
_TAPS = 3
_CHANNELS = 640  # of those in this model, the number for which cuDNN is slower: 57 us against 40 for 2 rows on an H200


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is made for such channels and this memory of the weight."""
    return (
        x.dtype != torch.float32
        and x.shape[-1] % _BLOCK_K == 0
        and len(weight) % 8 == 0
        and weight.is_contiguous(memory_format=torch.channels_last_3d)
    )


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether it is faster than the library, too."""
    return x.shape[-1] == _CHANNELS and fits(x, weight)


def conv_over_time(x: Tensor, weight: Tensor) -> Tensor:
    """See `plain.conv_over_time`."""
    b, f, h, w, channels = x.shape
    out_channels = len(weight)
    out = x.new_empty(b, f, h, w, out_channels)
    rows = f * h * w
    taps = weight.permute(0, 2, 3, 4, 1).view(out_channels, _TAPS * channels)  # as they lie in memory
    _conv_over_time[(triton.cdiv(out_channels, _BLOCK_N), triton.cdiv(rows, _BLOCK_M), b)](
        TensorDescriptor.from_tensor(x.contiguous().view(b, rows, channels), [1, _BLOCK_M, _BLOCK_K]),
        TensorDescriptor.from_tensor(taps, [_BLOCK_N, _BLOCK_K]),
        TensorDescriptor.from_tensor(out.view(b, rows, out_channels), [1, _BLOCK_M, _BLOCK_N]),
        h * w, channels,
        TAPS=_TAPS, BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K,
        num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
    )  # fmt: skip
    return out


@triton.jit
def _conv_over_time(
    x, weight, out, frame, channels,
    TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, m, sample = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M, tl.program_id(2)
    steps_of_tap = channels // BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(TAPS * steps_of_tap):
        row = m + (step // steps_of_tap - TAPS // 2) * frame
        pixels = x.load([sample, row, step % steps_of_tap * BLOCK_K]).reshape(BLOCK_M, BLOCK_K)
        total = tl.dot(pixels, weight.load([n, step * BLOCK_K]).T, total)
    out.store([sample, m, n], total.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N))
