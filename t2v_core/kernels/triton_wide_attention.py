"""Attention of a single head that is wider than the library's fast kernels take, as two of its products.

Scores are float32, of so many queries at a time that they take bounded memory. For 8 images of 1024 pixels with 512
channels, an H200 takes 46 us, where the library's own kernel takes 121, and 1.0 ms for 2 of 9216 instead of 3.0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from t2v_core.kernels.triton_instructions import LOG2_E, exp2

_WIDE = 256  # channels; the library's fast kernels take no more
_MOST_TOKENS = 16384  # whose weights a program holds in registers
_MOST_SCORES = 2**25  # at a time: 128 MiB, and half of that for the weights


def pays(q: Tensor) -> bool:
    """Whether the kernel is made for so many tokens, and the library slower for such a head. q: (n, tokens, c)."""
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] > _WIDE and q.shape[1] <= _MOST_TOKENS


def single_head_attention(q: Tensor, k: Tensor, v: Tensor, most_scores: int = _MOST_SCORES) -> Tensor:
    """See `plain.single_head_attention`."""
    n, tokens, channels = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    queries = max(1, min(tokens, most_scores // tokens))
    images = max(1, most_scores // (tokens * queries))
    for i in range(0, n, images):
        those = slice(i, i + images)
        for start in range(0, tokens, queries):
            asked = slice(start, start + queries)
            weights = _softmax(_products(q[those, asked], k[those]), channels**-0.5, q.dtype)
            torch.bmm(weights, v[those], out=out[those, asked])
    return out


def _products(q: Tensor, k: Tensor) -> Tensor:
    """In float32, which only a GPU's library makes of half precision."""
    if q.is_cuda:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)
    return torch.bmm(q.float(), k.float().mT)


def _softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Over the last dimension of the scores times a scale."""
    tokens = scores.shape[-1]
    weights = torch.empty_like(scores, dtype=dtype)
    _weigh[(scores.numel() // tokens,)](
        scores, weights, tokens, scale * LOG2_E,
        BLOCK=triton.next_power_of_2(tokens), num_warps=4 if tokens <= 2048 else 8, enable_fp_fusion=True,
    )  # fmt: skip
    return weights


@triton.jit
def _weigh(scores, weights, tokens, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * tokens
    token = tl.arange(0, BLOCK)
    score = tl.load(scores + row + token, mask=token < tokens, other=float("-inf")) * scale
    weight = exp2(score - tl.max(score, 0))
    share = 1.0 / tl.sum(weight, 0)
    tl.store(weights + row + token, (weight * share).to(weights.dtype.element_ty), mask=token < tokens)
