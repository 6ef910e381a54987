"""A product with the sum and the LayerNorm after it, and the product after that, in one kernel, for 320 channels.

Each of them would wait for the GPU's memory, and read what the one before has written. Here rows stay on a processor in
between. Two groups of warps have 64 rows each, and all columns of them; one warp fetches what goes in, and one the
weights, piece by piece. What is added is fetched to where the product's rows were; the sum leaves from there, and so
does the norm, unless it is multiplied: then it stays in registers.

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

from t2v_core.kernels.gluon_hopper import barriers, boxes, fetch, fetch_once_free, is_half, put, sums_of
from t2v_core.kernels.processors import num_processors

_WIDTH, _PIECE, _STAGES = 320, 64, 6
_PIECES = gl.constexpr(_WIDTH // _PIECE)  # of a row
_LEAST_BUSY = 0.75  # of the processors
_REGISTERS_TO_MULTIPLY, _REGISTERS_TO_FETCH = gl.constexpr(240), gl.constexpr(24)  # a thread


def fits(x: Tensor, weight: Tensor, then: Tensor | None) -> bool:
    """Whether the kernel is made for such channels."""
    weights = (weight,) if then is None else (weight, then)
    return is_half(x, *weights) and weight.shape == (_WIDTH, _WIDTH) and all(len(w) % _PIECE == 0 for w in weights)


def pays(x: Tensor, weight: Tensor, then: Tensor | None) -> bool:
    """Whether there are rows for most processors of a GPU, too."""
    units = triton.cdiv(x.numel() // x.shape[-1], 2 * _PIECE)
    return fits(x, weight, then) and units >= _LEAST_BUSY * num_processors(x.device)


def linear_norm(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    norm: nn.LayerNorm,
    *,
    residual: Tensor | None = None,
    then: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `ops.linear_norm`."""
    total = x.new_empty(x.shape) if out is None else out
    result = x.new_empty(*x.shape[:-1], _WIDTH if then is None else len(then))
    x_rows, total_rows, result_rows = x.contiguous().flatten(0, -2), total.flatten(0, -2), result.flatten(0, -2)
    added = x_rows if residual is None else residual.contiguous().flatten(0, -2)
    weights = (weight, weight if then is None else then)
    units = triton.cdiv(len(x_rows), 2 * _PIECE)
    _product_and_norm[(min(units, num_processors(x.device)),)](
        *(boxes(tensor, _PIECE, _PIECE) for tensor in (x_rows, *weights, added, total_rows, result_rows)),
        offset, norm.weight, norm.bias, units, norm.eps,
        STAGES=_STAGES, ADDS=residual is not None, NEXT=0 if then is None else len(then) // _PIECE,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return total, result


@gluon.jit(do_not_specialize=("units",))
def _product_and_norm(
    a, weight, next_weight, x, total, out, offset, gamma, beta, units, eps,
    STAGES: gl.constexpr, ADDS: gl.constexpr, NEXT: gl.constexpr,
):  # fmt: skip
    PIECE: gl.constexpr = a.block_type.shape[0]
    # Of two units and two groups.
    rows = gl.allocate_shared_memory(a.dtype, [4 * _PIECES, PIECE, PIECE], a.layout)
    stages = gl.allocate_shared_memory(weight.dtype, [STAGES, PIECE, PIECE], weight.layout)
    full, used = barriers(2 * _PIECES, 1), barriers(2 * _PIECES, 2)
    added, free = barriers(2 * _PIECES, 1), barriers(2 * _PIECES, 2)
    of_rows = (full, used, added, free)
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
        [_REGISTERS_TO_MULTIPLY, _REGISTERS_TO_FETCH, _REGISTERS_TO_FETCH],
    )


@gluon.jit
def _fetch_weights(weight, next_weight, stages, of_weight, units, NEXT: gl.constexpr):
    done = 0
    for _ in range(gl.program_id(0), units, gl.num_programs(0)):
        for i in range(_PIECES * _PIECES):
            done = _fetch_weight(weight, i % _PIECES, i // _PIECES, stages, of_weight, done)
        for i in range(_PIECES * NEXT):
            done = _fetch_weight(next_weight, i // _PIECES, i % _PIECES, stages, of_weight, done)


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
    for k in range(_PIECES):
        _fetch_piece(a, first, k, 0, full, rows)
    for unit in range(first, units, step):
        done = unit // step
        if ADDS:
            slot, phase = done % 2, done // 2 & 1
            for k in range(_PIECES):
                mbarrier.wait(used.index(slot * _PIECES + k), phase)
                _fetch_piece(x, unit, k, slot, added, rows)
        if unit + step < units:
            slot, phase = (done + 1) % 2, (done + 1) // 2 & 1
            for k in range(_PIECES):
                mbarrier.wait(free.index(slot * _PIECES + k), phase ^ 1)
                _fetch_piece(a, unit + step, k, slot, full, rows)


@gluon.jit
def _fetch_piece(tensor, unit, k, slot, full, rows):
    """Of both groups."""
    PIECE: gl.constexpr = rows.shape[1]
    mbarrier.expect(full.index(slot * _PIECES + k), 2 * tensor.block_type.nbytes)
    for group in gl.static_range(2):
        place = [(unit * 2 + group) * PIECE, k * PIECE]
        fetch(tensor, place, full.index(slot * _PIECES + k), rows.index((slot * 2 + group) * _PIECES + k))


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
        ours, row = (slot * 2 + group) * _PIECES, (unit * 2 + group) * PIECE
        nothing = gl.zeros([PIECE, PIECE], gl.float32, sums)
        pieces = ()
        for _ in gl.static_range(_PIECES):
            pieces = pieces + (nothing,)
        for k in range(_PIECES):
            number = done * (_PIECES * (_PIECES + NEXT)) + _PIECES * k
            mbarrier.wait(full.index(slot * _PIECES + k), phase)
            factor = rows.index(ours + k).load(as_factor)
            pieces = _multiply(factor, stages, of_weight, number, pieces)
            mbarrier.arrive(used.index(slot * _PIECES + k))
        if done > 0:  # what came of the unit before has left by now
            tma.store_wait(0)
            for n in gl.static_range(_PIECES):
                mbarrier.arrive(free.index((1 - slot) * _PIECES + n))

        summed = ()
        for n in gl.static_range(_PIECES):
            one = _add(pieces[n], offset, rows, ours, added, slot, phase, n, total, row, ADDS)
            summed = summed + (one,)
        together = summed[0]
        for n in gl.static_range(1, _PIECES):
            together = together + summed[n]
        mean = gl.sum(together, 1) / (_PIECES * PIECE)
        centred = ()
        for n in gl.static_range(_PIECES):
            centred = centred + (summed[n] - gl.expand_dims(mean, 1),)
        squares = centred[0] * centred[0]
        for n in gl.static_range(1, _PIECES):
            squares = squares + centred[n] * centred[n]
        scale = gl.expand_dims(gl.rsqrt(gl.sum(squares, 1) / (_PIECES * PIECE) + eps), 1)
        if NEXT == 0:
            tma.store_wait(0)  # the sum has left
            for n in gl.static_range(_PIECES):
                normed = _scaled(centred[n] * scale, gamma, beta, n, out.dtype)
                _put(out, [row, n * PIECE], rows.index(ours + n), normed)
        else:
            factors = ()
            for n in gl.static_range(_PIECES):
                normed = _scaled(centred[n] * scale, gamma, beta, n, out.dtype)
                factors = factors + (gl.convert_layout(normed, as_factor),)
            for n in range(NEXT):
                number = done * (_PIECES * (_PIECES + NEXT)) + _PIECES * (_PIECES + n)
                product = _begin(factors[0], stages, of_weight, number, nothing)
                for i in gl.static_range(1, _PIECES):
                    product = _begin(factors[i], stages, of_weight, number + i, product)
                    product = _end(product, of_weight, number + i - 1)
                # Without factors, which the next round needs: Triton 3.6's ptxas gave the registers of one to copies.
                product = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(of_weight[1].index((number + _PIECES - 1) % stages.shape[0]))
                tma.store_wait(0)
                _put(out, [row, n * PIECE], staged.index(group), product.to(out.dtype))
    tma.store_wait(0)


@gluon.jit
def _multiply(factor, stages, of_weight, number, sums):
    """The products with the next pieces of the weight, which are all of its columns."""
    products = ()
    for n in gl.static_range(_PIECES):
        products = products + (_begin(factor, stages, of_weight, number + n, sums[n]),)
        if n > 0:
            products = products[: n - 1] + (_end(products[n - 1], of_weight, number + n - 1), products[n])
    products = products[: _PIECES - 1] + (warpgroup_mma_wait(0, deps=[products[_PIECES - 1], factor])[0],)
    mbarrier.arrive(of_weight[1].index((number + _PIECES - 1) % stages.shape[0]))
    return products


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
        mbarrier.wait(added.index(slot * _PIECES + N), phase)
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
