"""Attention of pixels to the tokens of a text, which a program keeps in shared memory for all of its pixels.

The time goes into memory: each query is read once, and each result written once, in place. An H200 takes 227 us where
its library takes 283, for 48 frames of 9216 pixels, 5 heads and 77 tokens, and 140 instead of 172 for 256 of 1024.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_core.kernels.processors import num_processors
from t2v_core.kernels.triton_instructions import LOG2_E, exp2

_MOST_TOKENS = 128
_HEAD_DIMS = (16, 32, 64, 128)
_ROWS = 64  # of a product
_BLOCKS = (8, 4, 2, 1)  # of rows, that a program may have: as many as leave so many programs to each processor
_PROGRAMS = 4


def fits(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel is made for such heads, and for so many tokens as lie in memory."""
    is_half = queries.dtype in (torch.float16, torch.bfloat16) and queries.dtype == keys.dtype == values.dtype
    is_in_place = keys.stride() == values.stride() and keys.stride(-1) == 1
    _, _, tokens, head_dim = keys.shape
    return is_half and is_in_place and tokens <= _MOST_TOKENS and head_dim in _HEAD_DIMS


def text_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """See `plain.text_attention`."""
    queries = queries.contiguous()
    out = queries.new_empty(queries.shape)
    b, heads, tokens, head_dim = keys.shape
    rows = queries[0, ..., 0].numel()
    least = _PROGRAMS * num_processors(queries.device)
    blocks = next((n for n in _BLOCKS if triton.cdiv(rows, _ROWS * n) * heads * b >= least), min(_BLOCKS))
    _attend_to_text[(triton.cdiv(rows, _ROWS * blocks), heads, b)](
        queries, keys, values, out, rows, tokens, *keys.stride()[:3], LOG2_E / head_dim**0.5,
        HEADS=heads, HEAD_DIM=head_dim, TOKENS=triton.next_power_of_2(max(tokens, 16)), ROWS=_ROWS, BLOCKS=blocks,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("rows", "tokens"))
def _attend_to_text(
    queries, keys, values, out, rows, tokens, sample_stride, head_stride, token_stride, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token, column = tl.arange(0, TOKENS), tl.arange(0, HEAD_DIM)
    is_token = token < tokens
    of_text = sample * sample_stride + head * head_stride + token[:, None] * token_stride + column[None, :]
    k = tl.trans(tl.load(keys + of_text, mask=is_token[:, None], other=0.0))
    v = tl.load(values + of_text, mask=is_token[:, None], other=0.0)
    for i in tl.range(0, BLOCKS, num_stages=3):
        row = (tl.program_id(0) * BLOCKS + i) * ROWS + tl.arange(0, ROWS)
        is_row = row < rows
        place = (sample * rows + row)[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + column[None, :]
        q = tl.load(queries + place, mask=is_row[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        weights = exp2(scores - tl.max(scores, 1)[:, None])
        share = 1.0 / tl.sum(weights, 1)[:, None]
        attended = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * share
        tl.store(out + place, attended.to(out.dtype.element_ty), mask=is_row[:, None])
