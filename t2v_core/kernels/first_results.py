"""The first result of each kernel in Gluon, beside that of its plain equivalent.

Compilers get such kernels wrong without a word: that of Triton 3.6 gave the registers of one factor to another. Only
the numbers tell, and on the very GPU. So each kernel is held against them once, and left if they differ.
"""

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_TOLERANCE = 0.05  # of the norm: both are rounded to half precision, more than once
_ROWS = 128  # at either end


class FirstResults:
    """What is known of kernels by their variants: what is compiled once."""

    def __init__(self) -> None:
        self._is_right: dict[Hashable, bool] = {}

    def call(
        self,
        variant: Hashable,
        kernel: Callable[[], Result],
        pairs: Callable[[Result], Sequence[tuple[Tensor, Tensor]]],
    ) -> Result | None:
        """What the kernel gives, or None where it is wrong. pairs: some of a result, each with what it should be.

        The first call waits for the GPU, but not while it is captured in a graph: whatever is has been called before.
        """
        if not self._is_right.get(variant, True):
            return None
        result = kernel()
        if variant in self._is_right or _is_captured():
            return result
        errors = [_error(actual, exact) for actual, exact in pairs(result)]
        if any(map(math.isnan, errors)):  # of what is no number, nothing follows
            return result
        self._is_right[variant] = max(errors) <= _TOLERANCE
        if self._is_right[variant]:
            return result
        logger.warning("%s is wrong by %.2g with this Triton: a slower kernel is used", variant, max(errors))
        return None


def ends_of_rows(x: Tensor) -> Tensor:
    """Its first and last rows: those of the first and of the last programs. x: (..., c) -> (n, c)."""
    rows = x.flatten(0, -2)
    return torch.cat([rows[:_ROWS], rows[-_ROWS:]])


def ends_of_frames(x: Tensor) -> Tensor:
    """Its first and its last frame. x: (b, f, h, w, c) -> (1, 2, h, w, c)."""
    frames = x.flatten(0, 1)
    return torch.cat([frames[:1], frames[-1:]])[None]


def ends_of_pixels(x: Tensor) -> Tensor:
    """All frames of its first and last pixels. x: (b, f, h, w, c) -> (2, f, n, 1, c)."""
    pixels = x.flatten(2, 3)
    return torch.cat([pixels[:1, :, :_ROWS], pixels[-1:, :, -_ROWS:]])[:, :, :, None]


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _error(actual: Tensor, exact: Tensor) -> float:
    """Relative to the exact one. No number where that has none; infinite where only the other has none."""
    actual, exact = actual.float(), exact.float()
    if not bool(exact.isfinite().all()):
        return math.nan
    norm = torch.linalg.vector_norm
    error = (norm(actual - exact) / norm(exact).clamp(min=torch.finfo(torch.float32).tiny)).item()
    return math.inf if math.isnan(error) else error
