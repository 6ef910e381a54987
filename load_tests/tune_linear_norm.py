"""A product with the sum and the LayerNorm after it, and with the product after that, in one kernel.

    python load_tests/tune_linear_norm.py

With 320 channels, all of them wait for the GPU's memory, and read what the one before has written: the projection
before a transformer, which nothing is added to, and the last products of its attentions. Here rows stay on a processor
in between. Two groups of warps have 64 rows each, and all columns of them; one warp fetches what goes in, and one the
weights, piece by piece. What is added is fetched to where the product's rows were; the sum leaves from there, and so
does the norm, unless it is multiplied: then it stays in registers. For 2 and 16 rows of 16 frames of 256x256, and 2 of
24 frames of 576x320 and 1024x576: microseconds of both ways, with no product after the norm, with queries, and with
queries, keys and values, these also without a sum. For a Hopper GPU.
"""

import itertools
import sys
from functools import partial

import torch
import torch.nn.functional as F
import triton
from bench_gpu import relative_error
from bench_kernels import Timer
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

from t2v_core.kernels import add_layer_norm, layer_norm
from t2v_core.kernels.gluon_hopper import barriers, boxes, fetch, fetch_once_free, put, sums_of
from t2v_core.kernels.triton_geglu import num_processors

_WIDTH, _PIECE, _STAGES = 320, 64, 6
_USES = (True, 0), (True, 320), (True, 960), (False, 960)  # whether something is added; the next product's width
_REGISTERS = gl.constexpr(240)
_FEW_REGISTERS = gl.constexpr(24)
_ROWS = {
    "2 rows of 256x256": 2 * 16 * 1024,
    "16 rows of 256x256": 16 * 16 * 1024,
    "2 rows of 576x320": 2 * 24 * 2880,
    "2 rows of 1024x576": 2 * 24 * 9216,
}


def main() -> None:
    timer = Timer(torch.device("cuda"))
    with torch.inference_mode():
        for rows, use in itertools.product((1, 200, 40_000), _USES):
            given = _inputs(rows, *use)
            exact = _as_it_is(given.double())
            errors = [relative_error(*pair) for pair in zip(_in_one(given.half()), exact, strict=True)]
            sys.stdout.write(f"{rows} rows, {use}: {' '.join(f'{error:.1e}' for error in errors)}\n")
            assert max(errors) < 2e-3
        for (name, rows), use in itertools.product(_ROWS.items(), _USES):
            given = _inputs(rows, *use)
            us = {title: timer.us(partial(way, given)) for title, way in (("", _as_it_is), ("one", _in_one))}
            sys.stdout.write(f"{name}, {use}: {us['']:.1f} us, in one {us['one']:.1f} us\n")
            sys.stdout.flush()


class Inputs(nn.Module):
    """a, x: (rows, 320), x if it is added; the weights of two products, the second with or without rows; a norm."""

    def __init__(self, rows: int, adds: bool, next_width: int) -> None:
        super().__init__()
        self.a, self.x = (nn.Buffer(torch.randn(rows, _WIDTH)) if there else None for there in (True, adds))
        self.weight, self.next_weight = (
            nn.Buffer(torch.randn(width, _WIDTH) / _WIDTH**0.5) for width in (_WIDTH, next_width)
        )
        self.offset, self.norm = nn.Buffer(torch.randn(_WIDTH)), nn.LayerNorm(_WIDTH)
        nn.init.normal_(self.norm.weight, 0.5, 0.5)
        nn.init.normal_(self.norm.bias, 0.5, 0.5)


def _inputs(rows: int, adds: bool, next_width: int) -> Inputs:
    torch.manual_seed(0)
    return Inputs(rows, adds, next_width).to("cuda", torch.float16)


def _as_it_is(given: Inputs) -> tuple[Tensor, Tensor]:
    product = F.linear(given.a, given.weight)
    if given.x is None:
        total, normed = product, layer_norm(product, given.norm, given.offset)
    else:
        total, normed = add_layer_norm(given.x, product, given.offset, given.norm)
    return total, F.linear(normed, given.next_weight) if len(given.next_weight) else normed


def _in_one(given: Inputs) -> tuple[Tensor, Tensor]:
    """x + a weight^T + offset, or without x, a weight^T; and the norm, with offset, or the next product with that."""
    a, x, next_width = given.a, given.x, len(given.next_weight)
    total, out = torch.empty_like(a), a.new_empty(len(a), next_width or _WIDTH)
    weights, added = (given.weight, given.next_weight if next_width else given.weight), a if x is None else x
    units = triton.cdiv(len(a), 2 * _PIECE)
    _product_and_norm[(min(units, num_processors(a.device)),)](
        *(boxes(tensor, _PIECE, _PIECE) for tensor in (a, *weights, added, total, out)),
        given.offset, given.norm.weight, given.norm.bias, units, given.norm.eps,
        STAGES=_STAGES, ADDS=x is not None, NEXT=next_width // _PIECE, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return total, out


@gluon.jit
def _product_and_norm(
    a, weight, next_weight, x, total, out, offset, gamma, beta, units, eps,
    STAGES: gl.constexpr, ADDS: gl.constexpr, NEXT: gl.constexpr,
):  # fmt: skip
    PIECE: gl.constexpr = a.block_type.shape[0]
    # Pieces of 64 columns, of two units and two groups: 20 in all.
    rows = gl.allocate_shared_memory(a.dtype, [20, PIECE, PIECE], a.layout)
    stages = gl.allocate_shared_memory(weight.dtype, [STAGES, PIECE, PIECE], weight.layout)
    of_rows = (barriers(10, 1), barriers(10, 2), barriers(10, 1), barriers(10, 2))
    of_weight = (barriers(STAGES, 1), barriers(STAGES, 2))
    staged = gl.allocate_shared_memory(a.dtype, [2, PIECE, PIECE], a.layout)
    given = (offset, gamma, beta, eps)
    gl.warp_specialize(
        [
            (_one_group, (0, total, out, given, rows, of_rows, stages, of_weight, staged, units, ADDS, NEXT)),
            (_one_group, (1, total, out, given, rows, of_rows, stages, of_weight, staged, units, ADDS, NEXT)),
            (_fetch_rows, (a, x, rows, of_rows, units, ADDS)),
            (_fetch_weights, (weight, next_weight, stages, of_weight, units, NEXT)),
        ],
        [4, 1, 1],
        [_REGISTERS, _FEW_REGISTERS, _FEW_REGISTERS],
    )


@gluon.jit
def _fetch_weights(weight, next_weight, stages, of_weight, units, NEXT: gl.constexpr):
    done = 0
    for _ in range(gl.program_id(0), units, gl.num_programs(0)):
        for i in range(25):
            done = _fetch_weight(weight, i % 5, i // 5, stages, of_weight, done)
        for i in range(5 * NEXT):
            done = _fetch_weight(next_weight, i // 5, i % 5, stages, of_weight, done)


@gluon.jit
def _fetch_weight(weight, n, k, stages, of_weight, done):
    full, free = of_weight
    STAGES: gl.constexpr = stages.shape[0]
    PIECE: gl.constexpr = stages.shape[1]
    stage, phase = done % STAGES, done // STAGES & 1 ^ 1
    place = [n * PIECE, k * PIECE]
    fetch_once_free(weight, place, free.index(stage), phase, full.index(stage), stages.index(stage))
    return done + 1


@gluon.jit
def _fetch_rows(a, x, rows, of_rows, units, ADDS: gl.constexpr):
    """What is multiplied, a unit ahead, and what is added, if anything is, in its place."""
    full, used, added, free = of_rows
    first, step = gl.program_id(0), gl.num_programs(0)
    for k in range(5):
        _fetch_piece(a, first, k, 0, full, rows)
    for unit in range(first, units, step):
        done = unit // step
        if ADDS:
            slot, phase = done % 2, done // 2 & 1
            for k in range(5):
                mbarrier.wait(used.index(slot * 5 + k), phase)
                _fetch_piece(x, unit, k, slot, added, rows)
        if unit + step < units:
            slot, phase = (done + 1) % 2, (done + 1) // 2 & 1
            for k in range(5):
                mbarrier.wait(free.index(slot * 5 + k), phase ^ 1)
                _fetch_piece(a, unit + step, k, slot, full, rows)


@gluon.jit
def _fetch_piece(tensor, unit, k, slot, full, rows):
    """Of both groups."""
    PIECE: gl.constexpr = rows.shape[1]
    mbarrier.expect(full.index(slot * 5 + k), 2 * tensor.block_type.nbytes)
    for group in gl.static_range(2):
        place = [(unit * 2 + group) * PIECE, k * PIECE]
        fetch(tensor, place, full.index(slot * 5 + k), rows.index((slot * 2 + group) * 5 + k))


@gluon.jit
def _one_group(
    group, total, out, given, rows, of_rows, stages, of_weight, staged, units, ADDS: gl.constexpr, NEXT: gl.constexpr
):  # fmt: skip
    offset, gamma, beta, eps = given
    full, used, added, free = of_rows
    PIECE: gl.constexpr = rows.shape[1]
    sums: gl.constexpr = sums_of(PIECE)
    as_factor: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums, k_width=2)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        done = unit // gl.num_programs(0)
        slot, phase = done % 2, done // 2 & 1
        ours, row = (slot * 2 + group) * 5, (unit * 2 + group) * PIECE
        nothing = gl.zeros([PIECE, PIECE], gl.float32, sums)
        s0, s1, s2, s3, s4 = nothing, nothing, nothing, nothing, nothing
        for k in range(5):
            number = done * (25 + 5 * NEXT) + 5 * k
            mbarrier.wait(full.index(slot * 5 + k), phase)
            factor = rows.index(ours + k).load(as_factor)
            s0 = _begin(factor, stages, of_weight, number, s0)
            s1 = _begin(factor, stages, of_weight, number + 1, s1)
            s0 = _end(s0, of_weight, number)
            s2 = _begin(factor, stages, of_weight, number + 2, s2)
            s1 = _end(s1, of_weight, number + 1)
            s3 = _begin(factor, stages, of_weight, number + 3, s3)
            s2 = _end(s2, of_weight, number + 2)
            s4 = _begin(factor, stages, of_weight, number + 4, s4)
            s3 = _end(s3, of_weight, number + 3)
            s4, factor = warpgroup_mma_wait(0, deps=[s4, factor])
            mbarrier.arrive(of_weight[1].index((number + 4) % stages.shape[0]))
            mbarrier.arrive(used.index(slot * 5 + k))
        if done > 0:  # what came of the unit before has left by now
            tma.store_wait(0)
            for n in gl.static_range(5):
                mbarrier.arrive(free.index((1 - slot) * 5 + n))

        s0 = _add(s0, offset, rows, ours, added, slot, phase, 0, total, row, ADDS)
        s1 = _add(s1, offset, rows, ours, added, slot, phase, 1, total, row, ADDS)
        s2 = _add(s2, offset, rows, ours, added, slot, phase, 2, total, row, ADDS)
        s3 = _add(s3, offset, rows, ours, added, slot, phase, 3, total, row, ADDS)
        s4 = _add(s4, offset, rows, ours, added, slot, phase, 4, total, row, ADDS)
        mean = gl.sum(s0 + s1 + s2 + s3 + s4, 1) / (5 * PIECE)
        centre = gl.expand_dims(mean, 1)
        s0, s1, s2, s3, s4 = s0 - centre, s1 - centre, s2 - centre, s3 - centre, s4 - centre
        variance = gl.sum(s0 * s0 + s1 * s1 + s2 * s2 + s3 * s3 + s4 * s4, 1) / (5 * PIECE)
        scale = gl.expand_dims(gl.rsqrt(variance + eps), 1)
        if NEXT == 0:
            tma.store_wait(0)  # the sum has left
            _put(out, [row, 0], rows.index(ours), _scaled(s0 * scale, gamma, beta, 0, out.dtype))
            _put(out, [row, PIECE], rows.index(ours + 1), _scaled(s1 * scale, gamma, beta, 1, out.dtype))
            _put(out, [row, 2 * PIECE], rows.index(ours + 2), _scaled(s2 * scale, gamma, beta, 2, out.dtype))
            _put(out, [row, 3 * PIECE], rows.index(ours + 3), _scaled(s3 * scale, gamma, beta, 3, out.dtype))
            _put(out, [row, 4 * PIECE], rows.index(ours + 4), _scaled(s4 * scale, gamma, beta, 4, out.dtype))
        else:
            f0 = gl.convert_layout(_scaled(s0 * scale, gamma, beta, 0, out.dtype), as_factor)
            f1 = gl.convert_layout(_scaled(s1 * scale, gamma, beta, 1, out.dtype), as_factor)
            f2 = gl.convert_layout(_scaled(s2 * scale, gamma, beta, 2, out.dtype), as_factor)
            f3 = gl.convert_layout(_scaled(s3 * scale, gamma, beta, 3, out.dtype), as_factor)
            f4 = gl.convert_layout(_scaled(s4 * scale, gamma, beta, 4, out.dtype), as_factor)
            for n in range(NEXT):
                number = done * (25 + 5 * NEXT) + 25 + 5 * n
                product = _begin(f0, stages, of_weight, number, nothing)
                product = _begin(f1, stages, of_weight, number + 1, product)
                product = _end(product, of_weight, number)
                product = _begin(f2, stages, of_weight, number + 2, product)
                product = _end(product, of_weight, number + 1)
                product = _begin(f3, stages, of_weight, number + 3, product)
                product = _end(product, of_weight, number + 2)
                product = _begin(f4, stages, of_weight, number + 4, product)
                product = _end(product, of_weight, number + 3)
                product, f4 = warpgroup_mma_wait(0, deps=[product, f4])
                mbarrier.arrive(of_weight[1].index((number + 4) % stages.shape[0]))
                tma.store_wait(0)
                _put(out, [row, n * PIECE], staged.index(group), product.to(out.dtype))
    tma.store_wait(0)


@gluon.jit
def _begin(factor, stages, of_weight, number, sums):
    """A product with the next piece of the weights, which is the `number`th."""
    STAGES: gl.constexpr = stages.shape[0]
    mbarrier.wait(of_weight[0].index(number % STAGES), number // STAGES & 1)
    return warpgroup_mma(factor, stages.index(number % STAGES).permute([1, 0]), sums, is_async=True)


@gluon.jit
def _end(product, of_weight, number):
    """That with the `number`th piece is done, while the next one is under way."""
    product = warpgroup_mma_wait(1, deps=[product])
    mbarrier.arrive(of_weight[1].index(number % of_weight[1].shape[0]))
    return product


@gluon.jit
def _add(sums, offset, rows, ours, added, slot, phase, N: gl.constexpr, total, row, ADDS: gl.constexpr):
    """Columns of the sum, which are written from where those were that are added."""
    PIECE: gl.constexpr = rows.shape[1]
    layout: gl.constexpr = sums_of(PIECE)
    piece = rows.index(ours + N)
    columns = N * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, layout))
    with_offset = sums + gl.expand_dims(gl.load(offset + columns).to(gl.float32), 0)
    if ADDS:
        mbarrier.wait(added.index(slot * 5 + N), phase)
        with_offset += piece.load(layout).to(gl.float32)
        sums = with_offset
    _put(total, [row, N * PIECE], piece, sums.to(total.dtype))
    return with_offset


@gluon.jit
def _scaled(values, gamma, beta, N: gl.constexpr, dtype: gl.constexpr):
    """Columns of the norm."""
    PIECE: gl.constexpr = values.shape[1]
    columns = N * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(0, sums_of(PIECE)))
    values = values * gl.expand_dims(gl.load(gamma + columns).to(gl.float32), 0)
    return (values + gl.expand_dims(gl.load(beta + columns).to(gl.float32), 0)).to(dtype)


@gluon.jit
def _put(tensor, place, piece, values):
    piece.store(values)
    fence_async_shared()
    put(tensor, place, piece)


if __name__ == "__main__":
    main()
