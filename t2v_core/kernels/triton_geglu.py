"""The first half of a feed-forward: one product whose gate is applied before anything is written.

For Hopper GPUs, whose copy engine fetches the rows of both halves of the weight as one box.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from t2v_core.kernels.fp8 import scale_of

# Two programs share a processor, so that one gates while the other multiplies; of short products, three.
_BLOCK_M, _BLOCK_N, _GROUP_M, _NUM_WARPS = 128, 64, 8, 4
_BLOCK_K_BYTES = 128  # a row of the copy engine's boxes
_SHORT = 512


def fits(x: Tensor, proj: nn.Linear) -> bool:
    """Whether the kernel is made for such channels, and their memory for the copy engine."""
    sizes = x.shape[-1], proj.out_features // 2
    return x.dtype == proj.weight.dtype != torch.float32 and not any(size * x.element_size() % 16 for size in sizes)


def geglu(x: Tensor, proj: nn.Linear, out: Tensor | None = None) -> Tensor:
    """See `plain.geglu`."""
    width, inner = x.shape[-1], proj.out_features // 2
    is_short = width <= _SHORT
    if out is None:
        out = x.new_empty(*x.shape[:-1], inner, dtype=proj.bias.dtype)
    block_k = _BLOCK_K_BYTES // x.element_size()
    x_rows, out_rows = x.flatten(0, -2), out.flatten(0, -2)
    _geglu[(triton.cdiv(len(x_rows), _BLOCK_M) * triton.cdiv(inner, _BLOCK_N),)](
        TensorDescriptor.from_tensor(x_rows, [_BLOCK_M, block_k]),
        TensorDescriptor.from_tensor(proj.weight.view(2, inner, width), [2, _BLOCK_N, block_k]),
        TensorDescriptor.from_tensor(out_rows, [_BLOCK_M, _BLOCK_N]),
        proj.bias, len(x_rows), inner, width,
        SCALE=scale_of(proj.weight), BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=block_k, GROUP_M=_GROUP_M,
        num_warps=_NUM_WARPS, num_stages=2 if is_short else 3, maxnreg=168 if is_short else None, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def _geglu(
    x, weight, out, bias, rows, inner, width,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    _tile(tl.program_id(0), x, weight, out, bias, rows, inner, width, SCALE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)


@triton.jit
def _tile(
    program, x, weight, out, bias, rows, inner, width,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs that run together share rows and columns of the operands (as in Triton's tutorial on products).
    num_m, num_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(inner, BLOCK_N)
    first_m = program // (GROUP_M * num_n) * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    m = (first_m + program % (GROUP_M * num_n) % size_m) * BLOCK_M
    n = program % (GROUP_M * num_n) // size_m * BLOCK_N

    both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k in range(0, width, BLOCK_K):
        both = tl.dot(x.load([m, k]), weight.load([0, n, k]).reshape(2 * BLOCK_N, BLOCK_K).T, both)
    value, gate = (both * SCALE).reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
    column = n + tl.arange(0, BLOCK_N)
    is_column = column < inner
    value += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + inner + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    out.store([m, n], (value * _gelu(gate)).to(out.dtype))


@triton.jit
def _gelu(x):
    """x Phi(x), within 3.5e-6, with log2(Phi(x) / Phi(-x)) = x p(x^2): a fit of p that has no bend up to infinity."""
    u = x * x
    p = (((3.2289923e-6 * u - 8.8238187e-5) * u - 3.6027431e-4) * u + 0.10522669) * u + 2.3020454
    return x / (1.0 + tl.exp2(-x * p))
