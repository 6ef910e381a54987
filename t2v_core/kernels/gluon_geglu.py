"""GEGLU of narrow layers: rows that stay on a processor while the weight passes by.

Two groups of warps take turns with the columns: one multiplies while the other gates, and a single warp fetches for
both (as CUTLASS's "ping-pong" kernels do). The rows are fetched once for many columns, which halves what the processors
read from the cache. Triton does not arrange a program like this; Gluon, its language one level below, leaves it to us.

For Hopper GPUs and half precision.
"""

import triton
from torch import Tensor, nn
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from t2v_core.kernels.gluon_hopper import SHARED_BYTES, barriers, boxes, fetch_once_free, is_half, put, sums_of
from t2v_core.kernels.processors import num_processors
from t2v_core.kernels.triton_instructions import gelu

_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 64, 64  # rows, columns of each half, and channels at a time
# Of the weight, in a processor. With 3, which is all that rows of 640 channels leave room for, Triton's kernel is
# faster: 87 us against 98 for 8192 rows on an H200, where it takes 107 against 91 for 32768 rows of 320 channels.
_FEWEST_STAGES, _MOST_STAGES = 4, 8
_LEAST_BUSY = 0.75  # of the processors
_REGISTERS_TO_MULTIPLY, _REGISTERS_TO_FETCH = gl.constexpr(240), gl.constexpr(24)  # a thread


def fits(x: Tensor, proj: nn.Linear) -> bool:
    """Whether the kernel is made for such channels, whose rows leave room for the weight."""
    is_even = x.shape[-1] % _BLOCK_K == 0 and proj.out_features % (8 * _BLOCK_N) == 0
    return is_half(x, proj.weight) and is_even and _num_stages(x) >= _FEWEST_STAGES


def pays(x: Tensor, proj: nn.Linear) -> bool:
    """Whether there are rows for most processors of a GPU, too."""
    blocks = triton.cdiv(x.numel() // x.shape[-1], _BLOCK_M)
    return fits(x, proj) and 2 * blocks >= _LEAST_BUSY * num_processors(x.device)


def geglu(x: Tensor, proj: nn.Linear, out: Tensor | None = None) -> Tensor:
    """See `plain.geglu`."""
    width, inner = x.shape[-1], proj.out_features // 2
    if out is None:
        out = x.new_empty(*x.shape[:-1], inner)
    x_rows, out_rows = x.flatten(0, -2), out.flatten(0, -2)
    blocks, processors = triton.cdiv(len(x_rows), _BLOCK_M), num_processors(x.device)
    # In how many parts a block's columns are shared out: in which the last round leaves fewer processors idle.
    parts = min((1, 2), key=lambda parts: triton.cdiv(blocks * parts, processors) / parts)
    _in_turns[(min(blocks * parts, processors),)](
        boxes(x_rows, _BLOCK_M, _BLOCK_K),
        boxes(proj.weight.view(2, inner, width), 2, _BLOCK_N, _BLOCK_K),
        boxes(out_rows, _BLOCK_M, _BLOCK_N),
        proj.bias, blocks * parts, parts, inner,
        STEPS=width // _BLOCK_K, STAGES=_num_stages(x), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _num_stages(x: Tensor) -> int:
    """Of the weight, that fit beside the rows and what is written."""
    kept = _BLOCK_M * (x.shape[-1] + _BLOCK_N)
    return min(_MOST_STAGES, (SHARED_BYTES // x.element_size() - kept) // (2 * _BLOCK_N * _BLOCK_K))


@gluon.jit(do_not_specialize=("units", "parts"))
def _in_turns(x, weight, out, bias, units, parts, inner, STEPS: gl.constexpr, STAGES: gl.constexpr):
    """A unit is a block of rows with a part of the columns. Its tiles are taken by the two groups in turn."""
    BLOCK_M: gl.constexpr = out.block_type.shape[0]
    BLOCK_N: gl.constexpr = out.block_type.shape[1]
    BLOCK_K: gl.constexpr = x.block_type.shape[1]
    rows = gl.allocate_shared_memory(x.dtype, [STEPS, BLOCK_M, BLOCK_K], x.layout)
    stages = gl.allocate_shared_memory(weight.dtype, [STAGES, 2, BLOCK_N, BLOCK_K], weight.layout)
    gated = gl.allocate_shared_memory(out.dtype, [BLOCK_M, BLOCK_N], out.layout)
    fetched = (rows, barriers(STEPS, 1), barriers(STEPS, 2), stages, barriers(STAGES, 1), barriers(STAGES, 1))
    turns = barriers(2, 1)
    starts = barriers(2, 1)
    cut = (units, parts, inner)
    gl.warp_specialize(
        [
            (_multiply_and_gate, (0, out, bias, gated, turns, starts, fetched, cut)),
            (_multiply_and_gate, (1, out, bias, gated, turns, starts, fetched, cut)),
            (_fetch_all, (x, weight, fetched, cut)),
        ],
        [4, 1],
        [_REGISTERS_TO_MULTIPLY, _REGISTERS_TO_FETCH],
    )


@gluon.jit
def _fetch_all(x, weight, fetched, cut):
    rows, rows_full, rows_free, stages, full, free = fetched
    units, parts, inner = cut
    STEPS: gl.constexpr = rows.shape[0]
    BLOCK_M: gl.constexpr = rows.shape[1]
    BLOCK_K: gl.constexpr = rows.shape[2]
    STAGES: gl.constexpr = stages.shape[0]
    BLOCK_N: gl.constexpr = stages.shape[2]
    tiles = inner // (parts * BLOCK_N)
    done = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        row, first = unit // parts * BLOCK_M, unit % parts * tiles
        units_done = unit // gl.num_programs(0)
        for tile in range(tiles):
            for k in range(STEPS):
                if tile == 0:
                    place = [row, k * BLOCK_K]
                    phase = units_done & 1 ^ 1
                    fetch_once_free(x, place, rows_free.index(k), phase, rows_full.index(k), rows.index(k))
                stage, phase = done % STAGES, done // STAGES & 1 ^ 1
                place = [0, (first + tile) * BLOCK_N, k * BLOCK_K]
                fetch_once_free(weight, place, free.index(stage), phase, full.index(stage), stages.index(stage))
                done += 1


@gluon.jit
def _multiply_and_gate(which, out, bias, gated, turns, starts, fetched, cut):
    """Every second tile, from the first or the second on."""
    rows, rows_full, rows_free, stages, full, free = fetched
    units, parts, inner = cut
    STEPS: gl.constexpr = rows.shape[0]
    STAGES: gl.constexpr = stages.shape[0]
    BLOCK_M: gl.constexpr = gated.shape[0]
    BLOCK_N: gl.constexpr = gated.shape[1]
    BLOCK_K: gl.constexpr = rows.shape[2]
    sums: gl.constexpr = sums_of(2 * BLOCK_N)
    tiles = inner // (parts * BLOCK_N)
    column = gl.arange(0, 2 * BLOCK_N, layout=gl.SliceLayout(0, sums))
    column += gl.where(column < BLOCK_N, 0, inner - BLOCK_N)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        row, first = unit // parts * BLOCK_M, unit % parts * tiles
        units_done = unit // gl.num_programs(0)
        for tile in range(which, tiles, 2):
            tiles_done = units_done * tiles + tile  # by both groups
            is_last = tile + 2 >= tiles
            place = (first + tile) * BLOCK_N
            offset = gl.load(bias + place + column).to(gl.float32)
            both = gl.zeros([BLOCK_M, 2 * BLOCK_N], gl.float32, sums) + gl.expand_dims(offset, 0)
            # The other group has seen all stages before ours come: a barrier tells a stage only from the one before.
            mbarrier.wait(starts.index(which), (tiles_done // 2 + 1 - which) & 1)
            for k in range(STEPS):
                done = tiles_done * STEPS + k
                stage = done % STAGES
                mbarrier.wait(rows_full.index(k), units_done & 1)
                mbarrier.wait(full.index(stage), done // STAGES & 1)
                columns = stages.index(stage).reshape([2 * BLOCK_N, BLOCK_K]).permute([1, 0])
                both = warpgroup_mma(rows.index(k), columns, both, is_async=True)
                both = warpgroup_mma_wait(1, deps=[both])
                if k > 0:  # the product before this one is done
                    mbarrier.arrive(free.index((done - 1) % STAGES))
                    mbarrier.arrive(rows_free.index(k - 1), pred=is_last)
            mbarrier.arrive(starts.index(1 - which))
            both = warpgroup_mma_wait(0, deps=[both])
            mbarrier.arrive(free.index((tiles_done * STEPS + STEPS - 1) % STAGES))
            mbarrier.arrive(rows_free.index(STEPS - 1), pred=is_last)

            value, gate = both.reshape([BLOCK_M, 2, BLOCK_N]).permute([0, 2, 1]).split()
            result = (value * gelu(gate)).to(out.dtype)
            mbarrier.wait(turns.index(which), (tiles_done // 2 + 1 - which) & 1)
            gated.store(result)
            fence_async_shared()
            put(out, [row, place], gated)
            tma.store_wait(0)
            mbarrier.arrive(turns.index(1 - which))
