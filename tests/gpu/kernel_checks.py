"""Random inputs of kernels, and how near their results must be to exact ones."""

import os

import torch
from torch import Tensor, nn

from t2v_core.kernels.fp8 import FP8

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED or not torch.cuda.is_available() else "cuda"
# The interpreter takes bf16 for integers where it multiplies matrices.
HALVES = [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16]
# Of fp8, half of the last digit is 2^-4; the interpreter rounds towards zero, and by a whole one.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, FP8: 0.1 if IS_INTERPRETED else 0.03}


def draw(*size: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    """Random values around a mean."""
    return torch.randn(size, dtype=dtype, device=DEVICE) + mean


def randomised(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With weights that keep the size of what they are multiplied with."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5, 0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    return module.to(DEVICE, dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float | None = None) -> None:
    """Of that type, and as near to a result in float64 as it can be."""
    assert actual.dtype == dtype
    error = (actual.double() - expected).norm() / expected.norm()
    assert error.item() <= (tolerance or TOLERANCES[dtype])
