"""The first half of a feed-forward: one product whose gate is applied before anything is written.

For Hopper GPUs, whose copy engine fetches the rows of both halves of the weight as one box.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from t2v_core.kernels.fp8 import scale_of
from t2v_core.kernels.processors import num_processors, shared_bytes
from t2v_core.kernels.triton_instructions import gelu

_BLOCK_M = 128
_BLOCK_K_BYTES = 128  # a row of the copy engine's boxes
_SHORT_WIDTH = 512


class _Tiling(NamedTuple):
    """How a product is cut up. `group_m`: tiles below each other that are computed before those beside them."""

    block_n: int
    group_m: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


# Three programs share a processor, so that one gates while the others multiply.
_SHORT = _Tiling(block_n=64, group_m=8, num_warps=4, num_stages=2, maxnreg=168)
# A program stays on its processor, and loads the next tile while it gates the last.
_LONG = _Tiling(block_n=128, group_m=16, num_warps=8, num_stages=4, maxnreg=None)
# Of which a processor of a GeForce or RTX PRO GPU has no room for four stages, 176 KiB, but for two.
_LONG_BYTES, _FEWER_STAGES = 180 << 10, 2


def fits(x: Tensor, proj: nn.Linear) -> bool:
    """Whether the kernel is made for such channels, and their memory for the copy engine."""
    sizes = x.shape[-1], proj.out_features // 2
    return x.dtype == proj.weight.dtype != torch.float32 and not any(size * x.element_size() % 16 for size in sizes)


def geglu(x: Tensor, proj: nn.Linear, out: Tensor | None = None) -> Tensor:
    """See `plain.geglu`."""
    width, inner = x.shape[-1], proj.out_features // 2
    if out is None:
        out = x.new_empty(*x.shape[:-1], inner, dtype=proj.bias.dtype)
    is_short = width <= _SHORT_WIDTH
    tiling = _SHORT if is_short else _LONG
    if not is_short and shared_bytes(x.device) < _LONG_BYTES:
        tiling = _LONG._replace(num_stages=_FEWER_STAGES)
    block_n, block_k = tiling.block_n, _BLOCK_K_BYTES // x.element_size()
    x_rows, out_rows = x.flatten(0, -2), out.flatten(0, -2)
    tiles = triton.cdiv(len(x_rows), _BLOCK_M) * triton.cdiv(inner, block_n)
    kernel, programs = (_geglu, tiles) if is_short else (_geglu_that_stays, min(tiles, num_processors(x.device)))
    kernel[(programs,)](
        TensorDescriptor.from_tensor(x_rows, [_BLOCK_M, block_k]),
        TensorDescriptor.from_tensor(proj.weight.view(2, inner, width), [2, block_n, block_k]),
        TensorDescriptor.from_tensor(out_rows, [_BLOCK_M, block_n]),
        proj.bias, len(x_rows), inner, width,
        SCALE=scale_of(proj.weight), BLOCK_M=_BLOCK_M, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=tiling.group_m,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, maxnreg=tiling.maxnreg, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def _geglu(
    x, weight, out, bias, rows, inner, width,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    _tile(tl.program_id(0), x, weight, out, bias, rows, inner, width, SCALE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)


@triton.jit
def _geglu_that_stays(
    x, weight, out, bias, rows, inner, width,
    SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As `_geglu`, but a program takes one tile after the other, and loads the next one's in between."""
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(inner, BLOCK_N)
    for program in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        _tile(program, x, weight, out, bias, rows, inner, width, SCALE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)


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
    out.store([m, n], (value * gelu(gate)).to(out.dtype))
