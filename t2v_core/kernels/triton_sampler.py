"""A sampler's step of a whole batch: every number read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def sampler_update(
    latents: Tensor, eps: Tensor, history: Tensor, noise: Tensor | None, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """See `plain.sampler_update`."""
    latents, eps, history = latents.contiguous(), eps.contiguous(), history.contiguous()
    size = latents[0].numel()
    next_latents, next_history = torch.empty_like(latents), torch.empty_like(history)
    _update[(triton.cdiv(size, _BLOCK), len(latents))](
        latents, eps, history, latents if noise is None else noise.contiguous(), rows, next_latents, next_history, size,
        rows.stride(0), HAS_NOISE=noise is not None, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return next_latents, next_history


@triton.jit
def _update(
    latents, eps, history, noise, rows, next_latents, next_history, size, row_stride,
    HAS_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    row = rows + request * row_stride
    alpha, sigma, a, b0 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    b1, b2, c = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    own, own_history = request * size + place, 2 * request * size + place
    x = tl.load(latents + own, mask=mask)
    x0 = (x - sigma * tl.load(eps + own, mask=mask)) / alpha
    newest = tl.load(history + own_history, mask=mask)
    older = tl.load(history + own_history + size, mask=mask)
    result = a * x + b0 * x0 + b1 * newest + b2 * older
    if HAS_NOISE:
        result += c * tl.load(noise + own, mask=mask)
    tl.store(next_latents + own, result, mask=mask)
    tl.store(next_history + own_history, x0, mask=mask)
    tl.store(next_history + own_history + size, newest, mask=mask)
