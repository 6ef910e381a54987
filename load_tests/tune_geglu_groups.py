"""GEGLU of 320 channels by three or four groups of warps that share the weight: whether it may replace gluon_geglu's.

    python load_tests/tune_geglu_groups.py

There, two groups take turns, and each fetches its own part of the weight. Here each has 64 rows, and all use the same
part at nearly the same time: it is fetched once for up to 256 rows, which halves what the processors read from the
cache, and the gates of one group fall between the products of the others. For 2 and 16 rows of 16 frames of 256x256,
and 2 of 24 frames of 576x320 and 1024x576: microseconds and TFLOP/s. For a Hopper GPU.
"""

import itertools
from functools import partial
from typing import NamedTuple

import torch
import triton
from bench_kernels import Timer
from torch import Tensor, nn
from trials import compare
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from t2v_core.kernels import gluon_geglu
from t2v_core.kernels.gluon_hopper import SHARED_BYTES, barriers, boxes, fetch, fetch_once_free, put, sums_of
from t2v_core.kernels.triton_geglu import _gelu, num_processors

_GROUP_ROWS, _BLOCK_N = 64, 64  # of a group, and columns of each half
_WIDTH = 320
_ROWS = (2 * 16 * 1024, 16 * 16 * 1024, 2 * 24 * 2880, 2 * 24 * 9216)


class Choice(NamedTuple):
    """Groups, channels at a time, the parts that a block's columns are shared out in, and registers of a thread."""

    groups: int
    block_k: int
    parts: int
    registers: int


_CHOICES = tuple(
    Choice(groups, block_k, parts, registers)
    for (groups, registers), block_k, parts in itertools.product(((3, 160), (4, 112)), (32, 64), (1, 2, 5))
)


def main() -> None:
    timer = Timer(torch.device("cuda"))
    for rows in _ROWS:
        torch.manual_seed(0)
        x = torch.randn(rows, _WIDTH, device="cuda", dtype=torch.float16)
        proj = nn.Linear(_WIDTH, 8 * _WIDTH, device="cuda", dtype=torch.float16).requires_grad_(False)
        known = {"as it is": partial(gluon_geglu.geglu, x, proj)}
        tried = {
            str(tuple(choice)): partial(_geglu, x, proj, choice) for choice in _CHOICES if _num_stages(choice) >= 3
        }
        compare(f"{rows} rows", timer, known, tried, flop=2 * x.numel() * len(proj.weight))


def _num_stages(choice: Choice) -> int:
    """Of the weight, that fit beside the rows and what is written."""
    kept = choice.groups * _GROUP_ROWS * (_WIDTH + _BLOCK_N)
    return (SHARED_BYTES // 2 - kept) // (2 * _BLOCK_N * choice.block_k)


def _geglu(x: Tensor, proj: nn.Linear, choice: Choice) -> Tensor:
    """As `gluon_geglu.geglu`."""
    inner = proj.out_features // 2
    out = x.new_empty(len(x), inner)
    units = triton.cdiv(len(x), choice.groups * _GROUP_ROWS) * choice.parts
    _in_groups[(min(units, num_processors(x.device)),)](
        boxes(x, _GROUP_ROWS, choice.block_k),
        boxes(proj.weight.view(2, inner, _WIDTH), 2, _BLOCK_N, choice.block_k),
        boxes(out, _GROUP_ROWS, _BLOCK_N),
        proj.bias, units, choice.parts, inner,
        GROUPS=choice.groups, STEPS=_WIDTH // choice.block_k, STAGES=min(8, _num_stages(choice)),
        REGISTERS=choice.registers, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@gluon.jit
def _in_groups(
    x, weight, out, bias, units, parts, inner,
    GROUPS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """A unit is a block of rows, 64 for each group, with a part of the columns."""
    BLOCK_M: gl.constexpr = x.block_type.shape[0]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    BLOCK_N: gl.constexpr = out.block_type.shape[1]
    rows = gl.allocate_shared_memory(x.dtype, [STEPS * GROUPS, BLOCK_M, BLOCK_K], x.layout)
    stages = gl.allocate_shared_memory(weight.dtype, [STAGES, 2, BLOCK_N, BLOCK_K], weight.layout)
    gated = gl.allocate_shared_memory(out.dtype, [GROUPS, BLOCK_M, BLOCK_N], out.layout)
    of_rows = (barriers(STEPS, 1), barriers(STEPS, GROUPS))
    of_weight = (barriers(STAGES, 1), barriers(STAGES, GROUPS))
    fetched = (rows, stages)
    cut = (units, parts, inner)
    if GROUPS == 4:
        gl.warp_specialize(
            [
                (_one_group, (0, GROUPS, out, bias, gated, fetched, of_rows, of_weight, cut)),
                (_one_group, (1, GROUPS, out, bias, gated, fetched, of_rows, of_weight, cut)),
                (_one_group, (2, GROUPS, out, bias, gated, fetched, of_rows, of_weight, cut)),
                (_one_group, (3, GROUPS, out, bias, gated, fetched, of_rows, of_weight, cut)),
                (_fetch_all, (GROUPS, x, weight, fetched, of_rows, of_weight, cut)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_one_group, (0, GROUPS, out, bias, gated, fetched, of_rows, of_weight, cut)),
                (_one_group, (1, GROUPS, out, bias, gated, fetched, of_rows, of_weight, cut)),
                (_one_group, (2, GROUPS, out, bias, gated, fetched, of_rows, of_weight, cut)),
                (_fetch_all, (GROUPS, x, weight, fetched, of_rows, of_weight, cut)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


@gluon.jit
def _fetch_all(GROUPS: gl.constexpr, x, weight, fetched, of_rows, of_weight, cut):
    rows, stages = fetched
    rows_full, rows_free = of_rows
    full, free = of_weight
    units, parts, inner = cut
    STEPS: gl.constexpr = rows.shape[0] // GROUPS
    BLOCK_M: gl.constexpr = rows.shape[1]
    BLOCK_K: gl.constexpr = rows.shape[2]
    STAGES: gl.constexpr = stages.shape[0]
    BLOCK_N: gl.constexpr = stages.shape[2]
    tiles = inner // (parts * BLOCK_N)
    done = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        row, first = unit // parts * (GROUPS * BLOCK_M), unit % parts * tiles
        units_done = unit // gl.num_programs(0)
        for tile in range(tiles):
            for k in range(STEPS):
                if tile == 0:
                    mbarrier.wait(rows_free.index(k), units_done & 1 ^ 1)
                    mbarrier.expect(rows_full.index(k), GROUPS * x.block_type.nbytes)
                    for group in gl.static_range(GROUPS):
                        place = [row + group * BLOCK_M, k * BLOCK_K]
                        fetch(x, place, rows_full.index(k), rows.index(k * GROUPS + group))
                stage, phase = done % STAGES, done // STAGES & 1 ^ 1
                place = [0, (first + tile) * BLOCK_N, k * BLOCK_K]
                fetch_once_free(weight, place, free.index(stage), phase, full.index(stage), stages.index(stage))
                done += 1


@gluon.jit
def _one_group(group, GROUPS: gl.constexpr, out, bias, gated, fetched, of_rows, of_weight, cut):
    rows, stages = fetched
    rows_full, rows_free = of_rows
    full, free = of_weight
    units, parts, inner = cut
    STEPS: gl.constexpr = rows.shape[0] // GROUPS
    STAGES: gl.constexpr = stages.shape[0]
    BLOCK_M: gl.constexpr = gated.shape[1]
    BLOCK_N: gl.constexpr = gated.shape[2]
    BLOCK_K: gl.constexpr = rows.shape[2]
    sums: gl.constexpr = sums_of(2 * BLOCK_N)
    tiles = inner // (parts * BLOCK_N)
    column = gl.arange(0, 2 * BLOCK_N, layout=gl.SliceLayout(0, sums))
    column += gl.where(column < BLOCK_N, 0, inner - BLOCK_N)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        row, first = (unit // parts * GROUPS + group) * BLOCK_M, unit % parts * tiles
        units_done = unit // gl.num_programs(0)
        for tile in range(tiles):
            is_last = tile + 1 == tiles
            place = (first + tile) * BLOCK_N
            before = (units_done * tiles + tile) * STEPS
            offset = gl.load(bias + place + column).to(gl.float32)
            both = gl.zeros([BLOCK_M, 2 * BLOCK_N], gl.float32, sums) + gl.expand_dims(offset, 0)
            for k in range(STEPS):
                done = before + k
                stage = done % STAGES
                mbarrier.wait(rows_full.index(k), units_done & 1)
                mbarrier.wait(full.index(stage), done // STAGES & 1)
                columns = stages.index(stage).reshape([2 * BLOCK_N, BLOCK_K]).permute([1, 0])
                both = warpgroup_mma(rows.index(k * GROUPS + group), columns, both, is_async=True)
                both = warpgroup_mma_wait(1, deps=[both])
                if k > 0:  # the product before this one is done
                    mbarrier.arrive(free.index((done - 1) % STAGES))
                    mbarrier.arrive(rows_free.index(k - 1), pred=is_last)
            both = warpgroup_mma_wait(0, deps=[both])
            mbarrier.arrive(free.index((before + STEPS - 1) % STAGES))
            mbarrier.arrive(rows_free.index(STEPS - 1), pred=is_last)
            value, gate = both.reshape([BLOCK_M, 2, BLOCK_N]).permute([0, 2, 1]).split()
            result = (value * _gelu(gate)).to(out.dtype)
            tma.store_wait(0)
            gated.index(group).store(result)
            fence_async_shared()
            put(out, [row, place], gated.index(group))
    tma.store_wait(0)


if __name__ == "__main__":
    main()
