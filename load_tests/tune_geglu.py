r"""GEGLU's product in other tiles, and by programs that stay: what to set in `t2v_core/kernels/triton_geglu.py`.

    python load_tests/tune_geglu.py

For each width of the released UNet, with 2 and 16 rows of 16 frames of 256x256: microseconds and TFLOP/s of each
choice, the quickest first, and the largest difference of their results from those of today's.
"""

import contextlib
import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import triton
from bench_kernels import Timer
from torch import Tensor, nn
from triton.tools.tensor_descriptor import TensorDescriptor

from t2v_core.kernels import triton_geglu

_GPU = torch.device("cuda")
_BLOCK_K = 64
_GROUPS = (8, 16)
# Tiles (rows, columns of each half, warps), stages, groups, and programs that stay on a processor (0: one for a tile).
_CHOICES = (
    *itertools.product(((128, 64, 4),), (2, 3), _GROUPS, (0, 2, 3)),
    *itertools.product(((128, 128, 8), (256, 64, 8)), (3, 4), _GROUPS, (0, 1)),
)
_WIDTHS = ((320, 1024), (640, 256), (1280, 64))  # channels, pixels of a frame
_FRAMES = 16
_MOST_PROCESSES = 12

_Tile = tuple[int, int, int]


def main() -> None:
    timer = Timer(_GPU)
    with ProcessPoolExecutor(
        min(_MOST_PROCESSES, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        list(pool.map(_compile, *zip(*_CHOICES, strict=True)))
    for (width, pixels), num_rows in itertools.product(_WIDTHS, (2, 16)):
        torch.manual_seed(0)
        x, proj = _inputs(num_rows * _FRAMES * pixels, width)
        flop = 2 * x.numel() * len(proj.weight)
        reference = triton_geglu.geglu(x, proj)
        found = [(timer.us(partial(triton_geglu.geglu, x, proj)), "today's", 0.0)]
        for tile, stages, group, programs in _CHOICES:
            call = partial(_geglu, x, proj, tile, stages, group, programs)
            name = f"{tile}, {stages} stages, groups of {group}, {programs or 'no'} programs that stay"
            try:
                difference = (call() - reference).abs().max().item()
                found.append((timer.us(call), name, difference))
            except triton.runtime.errors.OutOfResources:
                continue
        sys.stdout.write(f"\n{width} channels, {num_rows} rows\n")
        for us, name, difference in sorted(found)[:8] + found[:1]:
            sys.stdout.write(f"{us:8.1f} us {flop / us / 1e6:4.0f} TFLOP/s  {name}  {difference:.1e}\n")
        sys.stdout.flush()


def _inputs(rows: int, width: int) -> tuple[Tensor, nn.Linear]:
    x = torch.randn(rows, width, device=_GPU, dtype=torch.float16)
    return x, nn.Linear(width, 8 * width, device=_GPU, dtype=torch.float16).requires_grad_(False)


def _compile(tile: _Tile, stages: int, group: int, programs: int) -> None:
    """For Triton's cache on disk, where the other widths find it as well."""
    with contextlib.suppress(triton.runtime.errors.OutOfResources):
        _geglu(*_inputs(1024, _WIDTHS[0][0]), tile, stages, group, programs)


def _geglu(x: Tensor, proj: nn.Linear, tile: _Tile, stages: int, group: int, programs: int) -> Tensor:
    block_m, block_n, num_warps = tile
    width, inner = x.shape[-1], proj.out_features // 2
    out = x.new_empty(len(x), inner)
    tiles = triton.cdiv(len(x), block_m) * triton.cdiv(inner, block_n)
    kernel = triton_geglu._geglu_that_stays if programs else triton_geglu._geglu
    kernel[(min(programs * triton_geglu.num_processors(_GPU) or tiles, tiles),)](
        TensorDescriptor.from_tensor(x, [block_m, _BLOCK_K]),
        TensorDescriptor.from_tensor(proj.weight.view(2, inner, width), [2, block_n, _BLOCK_K]),
        TensorDescriptor.from_tensor(out, [block_m, block_n]),
        proj.bias, len(x), inner, width,
        SCALE=1.0, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_BLOCK_K, GROUP_M=group,
        num_warps=num_warps, num_stages=stages, maxnreg=168 if num_warps == 4 and programs != 2 else None,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
