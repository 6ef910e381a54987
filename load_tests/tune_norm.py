r"""GroupNorm's sums and the pass after them in other tiles: what to set in `t2v_core/kernels/triton_group_scales.py`.

    python load_tests/tune_norm.py

For the released UNet's large images: microseconds and GB/s of what there is today and of the quickest other choices,
and how far their results are from the first's.
"""

import itertools
import math
from functools import partial
from unittest import mock

import torch
from bench_kernels import Timer
from torch import Tensor, nn
from trials import compare, compile_at_once

from t2v_core.kernels import triton_group_scales
from t2v_core.kernels.triton_group_scales import _Applying, _Summing, apply_scales, scales_of

_GPU = torch.device("cuda")
_GROUPS = 32
# Values of a tile with warps of a program; programs and stages; tiles of a program with stages.
_SUMMINGS = tuple(
    _Summing(values, warps, programs, 1024, stages)
    for (values, warps), programs, stages in itertools.product(
        ((1024, 1), (2048, 2), (4096, 2), (4096, 4), (8192, 4)), (528, 1056, 2112), (1, 2, 3, 4)
    )
)
_APPLYINGS = tuple(
    _Applying(values, warps, tiles, stages)
    for (values, warps), (tiles, stages) in itertools.product(
        ((1024, 1), (1024, 2), (2048, 1), (2048, 2), (4096, 1), (4096, 2), (4096, 4), (8192, 4)),
        ((1, 1), (2, 1), (4, 1), (4, 2), (8, 3)),
    )
)
# Rows, frames, height, width and channels: 24 frames of 1024x576 at three resolutions, 8 videos of 256x256.
_SHAPES = ((2, 24, 72, 128, 320), (2, 24, 36, 64, 640), (2, 24, 18, 32, 1280), (16, 16, 32, 32, 320))


def main() -> None:
    timer = Timer(_GPU)
    compile_at_once(_compile_sums, [(summing,) for summing in _SUMMINGS])
    compile_at_once(_compile_pass, [(applying,) for applying in _APPLYINGS])
    for shape, over_frames in itertools.product(_SHAPES, (True, False)):
        torch.manual_seed(0)
        x, delta, norm = _inputs(shape)
        samples = math.prod(shape[: 1 if over_frames else 2])
        name = f"{shape}, {samples} samples"
        for summand, passes in ((None, 1), (delta, 3)):
            compare(
                f"sums of {name}{'' if summand is None else ', of two added'}",
                timer,
                {"today's": partial(_scales, None, x, summand, norm, samples)},
                {str(tuple(summing)): partial(_scales, summing, x, summand, norm, samples) for summing in _SUMMINGS},
                moved_bytes=passes * x.nbytes,
            )
        scales, out = _scales(None, x, None, norm, samples), torch.empty_like(x)
        compare(
            f"pass over {name}",
            timer,
            {"today's": partial(_passed, None, x, scales, out)},
            {str(tuple(applying)): partial(_passed, applying, x, scales, out) for applying in _APPLYINGS},
            moved_bytes=2 * x.nbytes,
        )


def _inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, nn.GroupNorm]:
    x, delta = (torch.randn(shape, device=_GPU, dtype=torch.float16) for _ in range(2))
    return x, delta, nn.GroupNorm(_GROUPS, shape[-1], device=_GPU, dtype=torch.float16).requires_grad_(False)


def _compile_sums(summing: _Summing) -> None:
    """For Triton's cache on disk. A tile's channels are of one of three numbers."""
    for channels in (320, 640, 1280):
        x, delta, norm = _inputs((2, 1, 64, 64, channels))
        for summand in (None, delta):
            _scales(summing, x, summand, norm, 2)


def _compile_pass(applying: _Applying) -> None:
    for channels in (320, 640, 1280):
        x, _, norm = _inputs((2, 1, 64, 64, channels))
        _passed(applying, x, _scales(None, x, None, norm, 2), torch.empty_like(x))


def _scales(summing: _Summing | None, x: Tensor, delta: Tensor | None, norm: nn.GroupNorm, samples: int) -> Tensor:
    total = x if delta is None else torch.empty_like(x)
    if summing is None:
        return scales_of(x, total, norm, samples, delta=delta)
    with (
        mock.patch.object(triton_group_scales, "_SUMMING_FEW", summing),
        mock.patch.object(triton_group_scales, "_SUMMING_MANY", summing),
    ):
        return scales_of(x, total, norm, samples, delta=delta)


def _passed(applying: _Applying | None, x: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    if applying is None:
        apply_scales(x, None, scales, out, silu=True)
        return out
    with (
        mock.patch.object(triton_group_scales, "_WIDE_APPLIED", applying),
        mock.patch.object(triton_group_scales, "_NARROW_APPLIED", applying),
    ):
        apply_scales(x, None, scales, out, silu=True)
    return out


if __name__ == "__main__":
    main()
