r"""GEGLU's product in other tiles, and by programs that stay: what to set in `t2v_core/kernels/triton_geglu.py`.

    python load_tests/tune_geglu.py

For each width of the released UNet, with 2 and 16 rows of 16 frames of 256x256: microseconds and TFLOP/s of today's
kernels, of the quickest other choices, and how far their results are from the first's. A choice that does not fit into
a processor is left out.
"""

import itertools
from functools import partial

import torch
import triton
from bench_kernels import Timer
from torch import Tensor, nn
from trials import Way, compare, compile_at_once
from triton.tools.tensor_descriptor import TensorDescriptor

from t2v_core.kernels import gluon_geglu, triton_geglu
from t2v_core.kernels.processors import num_processors

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

_Tile = tuple[int, int, int]


def main() -> None:
    timer = Timer(_GPU)
    compile_at_once(_compile, _CHOICES)
    for (width, pixels), num_rows in itertools.product(_WIDTHS, (2, 16)):
        torch.manual_seed(0)
        x, proj = _inputs(num_rows * _FRAMES * pixels, width)
        known: dict[str, Way] = {"Triton": partial(triton_geglu.geglu, x, proj)}
        if gluon_geglu.fits(x, proj):
            known["Gluon"] = partial(gluon_geglu.geglu, x, proj)
        tried = {
            f"{tile}, {stages} stages, groups of {group}, {programs or 'no'} programs that stay": partial(
                _geglu, x, proj, tile, stages, group, programs
            )
            for tile, stages, group, programs in _CHOICES
        }
        compare(f"{width} channels, {num_rows} rows", timer, known, tried, flop=2 * x.numel() * len(proj.weight))


def _inputs(rows: int, width: int) -> tuple[Tensor, nn.Linear]:
    x = torch.randn(rows, width, device=_GPU, dtype=torch.float16)
    return x, nn.Linear(width, 8 * width, device=_GPU, dtype=torch.float16).requires_grad_(False)


def _compile(tile: _Tile, stages: int, group: int, programs: int) -> None:
    """For Triton's cache on disk, where the other widths find it as well."""
    _geglu(*_inputs(1024, _WIDTHS[0][0]), tile, stages, group, programs)


def _geglu(x: Tensor, proj: nn.Linear, tile: _Tile, stages: int, group: int, programs: int) -> Tensor:
    block_m, block_n, num_warps = tile
    width, inner = x.shape[-1], proj.out_features // 2
    out = x.new_empty(len(x), inner)
    tiles = triton.cdiv(len(x), block_m) * triton.cdiv(inner, block_n)
    kernel = triton_geglu._geglu_that_stays if programs else triton_geglu._geglu
    kernel[(min(programs * num_processors(_GPU) or tiles, tiles),)](
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
