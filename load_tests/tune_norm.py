r"""GroupNorm's sums and the pass after them in other tiles: what to set in `t2v_core/kernels/triton_group_scales.py`.

    python load_tests/tune_norm.py

Microseconds and GB/s of what there is today and of the quickest other choices, and how far their results are from the
first's: sums of one input, of two that are added, and of two beside each other, and the pass.
"""

import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from bench_kernels import Timer
from torch import Tensor, nn
from trials import compare, compile_at_once

from t2v_core.kernels import triton_group_scales
from t2v_core.kernels.triton_group_scales import _Summing, apply_scales, scales_of

_GPU = torch.device("cuda")
_GROUPS = 32
# Values of a tile with warps of a program; programs; stages.
_SUMMINGS = tuple(
    _Summing(values, warps, programs, stages)
    for (values, warps), programs, stages in itertools.product(
        ((1024, 1), (2048, 2), (4096, 2), (8192, 4)), (528, 1056, 2112), (1, 3, 4)
    )
)
_PASSES = ((1024, 1), (1024, 2), (2048, 2), (4096, 4))  # values of a tile with warps of a program
# Rows, frames, height, width and channels: of one video of 24 frames of 1024x576 and of 576x320, of 8 and of one of 16
# frames of 256x256; and of a decode.
_SHAPES = (
    (2, 24, 72, 128, 320),
    (2, 24, 36, 64, 640),
    (2, 24, 40, 72, 320),
    (2, 24, 20, 36, 640),
    (2, 24, 10, 18, 1280),
    (16, 16, 32, 32, 320),
    (16, 16, 16, 16, 640),
    (2, 16, 32, 32, 320),
    (2, 16, 16, 16, 640),
    (1, 8, 64, 64, 512),
)
_CHANNELS = sorted({shape[-1] for shape in _SHAPES})


class _Inputs(NamedTuple):
    x: Tensor
    second: Tensor
    narrow: nn.GroupNorm  # of one input, and of two that are added
    wide: nn.GroupNorm  # of two beside each other

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "_Inputs":
        torch.manual_seed(0)
        x, second = (torch.randn(shape, device=_GPU, dtype=torch.float16) for _ in range(2))
        narrow, wide = (
            nn.GroupNorm(_GROUPS, channels, device=_GPU, dtype=torch.float16).requires_grad_(False)
            for channels in (shape[-1], 2 * shape[-1])
        )
        return cls(x, second, narrow, wide)

    def scales(self, samples: int) -> Tensor:
        return scales_of(self.x, self.x, self.narrow, samples)

    def scales_of_added(self, samples: int) -> Tensor:
        return scales_of(self.x, torch.empty_like(self.x), self.narrow, samples, delta=self.second)

    def scales_beside(self, samples: int) -> Tensor:
        return scales_of(self.x, self.x, self.wide, samples, skip=self.second)


# What is summed: how, and how often as many bytes as x has are read or written.
_SUMS: dict[str, tuple[Callable[[_Inputs, int], Tensor], int]] = {
    "": (_Inputs.scales, 1),
    ", of two added": (_Inputs.scales_of_added, 3),
    ", of two beside each other": (_Inputs.scales_beside, 2),
}


def main() -> None:
    timer = Timer(_GPU)
    few = _SUMMINGS[0].programs  # for as many as there may be, a kernel is the same
    compile_at_once(_compile_sums, [(summing,) for summing in _SUMMINGS if summing.programs == few])
    compile_at_once(_compile_pass, [(of_pass,) for of_pass in _PASSES])
    for shape, over_frames in itertools.product(_SHAPES, (True, False)):
        inputs = _Inputs.of(shape)
        samples = math.prod(shape[: 1 if over_frames else 2])
        name = f"{shape}, {samples} samples"
        for what, (summed, passes) in _SUMS.items():
            compare(
                f"sums of {name}{what}",
                timer,
                {"today's": partial(summed, inputs, samples)},
                {str(tuple(summing)): partial(_with, summing, summed, inputs, samples) for summing in _SUMMINGS},
                moved_bytes=passes * inputs.x.nbytes,
            )
        scales, out = inputs.scales(samples), torch.empty_like(inputs.x)
        compare(
            f"pass over {name}",
            timer,
            {"today's": partial(_passed, None, inputs.x, scales, out)},
            {str(of_pass): partial(_passed, of_pass, inputs.x, scales, out) for of_pass in _PASSES},
            moved_bytes=2 * inputs.x.nbytes,
        )


def _compile_sums(summing: _Summing) -> None:
    """For Triton's cache on disk."""
    for channels in _CHANNELS:
        inputs = _Inputs.of((2, 1, 64, 64, channels))
        for summed, _ in _SUMS.values():
            _with(summing, summed, inputs, 2)


def _compile_pass(of_pass: tuple[int, int]) -> None:
    for channels in _CHANNELS:
        inputs = _Inputs.of((2, 1, 64, 64, channels))
        _passed(of_pass, inputs.x, inputs.scales(2), torch.empty_like(inputs.x))


def _with(summing: _Summing, summed: Callable[[_Inputs, int], Tensor], inputs: _Inputs, samples: int) -> Tensor:
    with mock.patch.object(triton_group_scales, "_summing_for", return_value=summing):
        return summed(inputs, samples)


def _passed(of_pass: tuple[int, int] | None, x: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    with ExitStack() as stack:
        if of_pass is not None:
            values, warps = of_pass
            for name, value in {"_VALUES": values, "_WARPS": warps, "_WARPS_FEW": warps}.items():
                stack.enter_context(mock.patch.object(triton_group_scales, f"_APPLIED{name}", value))
        apply_scales(x, None, scales, out, silu=True)
    return out


if __name__ == "__main__":
    main()
