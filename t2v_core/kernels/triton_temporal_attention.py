"""Attention over few frames, from a fused projection of channels-last frames.

A program takes some pixels of one head. Their frames are the rows of one small product, in which pixels do not see
each other: wasted arithmetic, but the time goes into memory, and each number is read once and in place.
"""

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64  # of a program's product
_HEAD_DIMS = (16, 32, 64, 128)


def fits(qkv: Tensor, heads: int) -> bool:
    """Whether the kernel is made for so many frames and such heads."""
    return qkv.shape[1] <= _ROWS and qkv.shape[-1] // (3 * heads) in _HEAD_DIMS


def temporal_attention(qkv: Tensor, heads: int) -> Tensor:
    """See `plain.temporal_attention`."""
    b, f, h, w, width = qkv.shape
    qkv = qkv.contiguous()
    inner = width // 3
    out = qkv.new_empty(b, f, h, w, inner)
    block_f = min(triton.next_power_of_2(f), _ROWS)
    block_p = _ROWS // block_f
    grid = (triton.cdiv(h * w, block_p), heads, b)
    _attend[grid](
        qkv, out, f, h * w, inner, (inner // heads) ** -0.5,
        HEAD_DIM=inner // heads, BLOCK_F=block_f, BLOCK_P=block_p,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    qkv, out, frames, pixels, inner, scale, HEAD_DIM: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr
):
    # From the end to the beginning: the rows that were written last are still in the cache.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    sample = tl.num_programs(2) - 1 - tl.program_id(2)
    row = tl.arange(0, BLOCK_P * BLOCK_F)
    frame, in_block = row // BLOCK_P, row % BLOCK_P  # pixels beside each other in memory are so here
    pixel = block * BLOCK_P + in_block
    is_there = (frame < frames) & (pixel < pixels)
    position = (sample * frames + frame).to(tl.int64) * pixels + pixel
    column = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    where = qkv + position[:, None] * (3 * inner) + column[None, :]
    q = tl.load(where, mask=is_there[:, None], other=0.0)
    k = tl.load(where + inner, mask=is_there[:, None], other=0.0)
    v = tl.load(where + 2 * inner, mask=is_there[:, None], other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    sees = (in_block[:, None] == in_block[None, :]) & (frame[None, :] < frames)
    scores = tl.where(sees, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)[:, None]
    attended = tl.dot(weights.to(v.dtype), v, input_precision="ieee") / total
    tl.store(
        out + position[:, None] * inner + column[None, :], attended.to(out.dtype.element_ty), mask=is_there[:, None]
    )
