"""Attention in short sequences: between the frames of a pixel, or the few pixels of a frame, from a fused projection.

A program takes some sequences of one head. Their tokens are the rows of one small product, in which sequences do not
see each other: wasted arithmetic, but the time goes into memory, and each number is read once and in place. An H200
takes 47 us where its library takes 88, for 256 frames of 8x8 pixels and 20 heads, and 12 instead of 87 of 4x4.
"""

import triton
import triton.language as tl
from torch import Tensor

from t2v_core.kernels.triton_instructions import LOG2_E, exp2

_ROWS = 64  # of a program's product
_HEAD_DIMS = (16, 32, 64, 128)


def fits(qkv: Tensor, heads: int, tokens: int) -> bool:
    """Whether the kernel is made for so many tokens and such heads."""
    return tokens <= _ROWS and qkv.shape[-1] // (3 * heads) in _HEAD_DIMS


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """See `plain.temporal_attention`."""
    b, f, h, w, _ = qkv.shape
    return _attended(qkv, heads, samples=b, tokens=f, sequences=h * w, token_stride=h * w, sequence_stride=1)


def spatial_attention(qkv: Tensor, heads: int) -> Tensor:
    """See `plain.spatial_attention`."""
    b, f, h, w, _ = qkv.shape
    return _attended(qkv, heads, samples=b, tokens=h * w, sequences=f, token_stride=1, sequence_stride=h * w)


def _attended(
    qkv: Tensor, heads: int, *, samples: int, tokens: int, sequences: int, token_stride: int, sequence_stride: int
) -> Tensor:
    """Strides are in rows."""
    qkv = qkv.contiguous()
    inner = qkv.shape[-1] // 3
    out = qkv.new_empty(*qkv.shape[:-1], inner)
    block_t = triton.next_power_of_2(tokens)
    block_s = _ROWS // block_t
    grid = (triton.cdiv(sequences, block_s), heads, samples)
    _attend[grid](
        qkv, out, tokens, sequences, token_stride, sequence_stride, inner, LOG2_E / (inner // heads) ** 0.5,
        HEAD_DIM=inner // heads, BLOCK_T=block_t, BLOCK_S=block_s,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("tokens", "sequences", "token_stride", "sequence_stride"))
def _attend(
    qkv, out, tokens, sequences, token_stride, sequence_stride, inner, scale,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # From the end to the beginning: the rows that were written last are still in the cache.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    sample = tl.num_programs(2) - 1 - tl.program_id(2)
    row = tl.arange(0, BLOCK_S * BLOCK_T)
    token, in_block = row // BLOCK_S, row % BLOCK_S  # pixels beside each other in memory are so here
    sequence = block * BLOCK_S + in_block
    is_there = (token < tokens) & (sequence < sequences)
    position = sample.to(tl.int64) * tokens * sequences + token * token_stride + sequence * sequence_stride
    column = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    where = qkv + position[:, None] * (3 * inner) + column[None, :]
    q = tl.load(where, mask=is_there[:, None], other=0.0)
    k = tl.load(where + inner, mask=is_there[:, None], other=0.0)
    v = tl.load(where + 2 * inner, mask=is_there[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # of powers of two
    sees = (in_block[:, None] == in_block[None, :]) & (token[None, :] < tokens)
    scores = tl.where(sees, scores, float("-inf"))
    weights = exp2(scores - tl.max(scores, 1)[:, None])
    share = 1.0 / tl.sum(weights, 1)[:, None]
    attended = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * share
    tl.store(
        out + position[:, None] * inner + column[None, :], attended.to(out.dtype.element_ty), mask=is_there[:, None]
    )
