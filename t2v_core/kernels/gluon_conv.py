"""Convolutions of three lines, each of which is fetched once for all of them: of frames, and over time.

A group of warps has 8 lines of 8 pixels, and fetches those with the line before and the one after: what a tap reads is
8 lines in a row of these 10. For taps beside each other they are fetched again, a pixel to the left and to the right.
Over time, lines are frames. Two groups share what is fetched of the weight; each has all its rows' columns in
registers, five pieces, for which it loads its rows from shared memory once. One warp fetches rows, and one the weight.

For Hopper GPUs and half precision.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from t2v_core.kernels import triton_conv
from t2v_core.kernels.gluon_hopper import (
    KEEPS_FACTORS,
    all_but,
    barriers,
    boxes,
    fetch,
    from_on,
    is_half,
    put,
    seen_as,
    sums_of,
)
from t2v_core.kernels.processors import num_processors

_LINES, _PIXELS, _CHANNELS = 8, 8, 64  # of a group's rows, at a time
_BOX_LINES = gl.constexpr(_LINES)
_FETCHED_PAIRS = gl.constexpr(_LINES // 2 + 1)  # of lines: these, the one before and the one after
_ROOM_PAIRS = gl.constexpr(8)  # more than are fetched: what is written leaves from there
_PIECES = gl.constexpr(5)
_STAGES = {64: 4, 32: 8}  # of the weight, by the columns of a piece
_ROW_STAGES = 2
_RUNS_AHEAD = KEEPS_FACTORS  # with a tap's products while those of the one before are under way
_WORTH = {64: 1.0, 32: 0.85}  # of the rate that large tiles have
# Or whole rounds of large tiles, and what would be left for the last one in small tiles: 401 and 388 us on an H200 for
# 48 frames of 40x72 and 320 channels, 24 of whose 1080 large tiles are in the ninth round of 132 processors.
_LAUNCHES = ((64,), (32,), (64, 32))  # by the columns of their pieces
_LAUNCH_COLUMNS = 600  # of a piece, times steps: about as long as a launch
_MOST_COMPUTED = 1.05  # of an image's pixels
# Of the processors, over all rounds. Of 24 frames of 10x18 and 1280 channels, 0.84 are, in two launches: 145 us over
# time, and the library 136.
_LEAST_BUSY = 0.85
# Of frames in more rounds of tiles, and in several tiles beside each other, the library is as fast or up to a tenth
# faster on an H200 (256 frames of 16x16 and 640 channels: 717 us against 762), which is hot by then.
_MOST_ROUNDS = 4
_REGISTERS_TO_MULTIPLY, _REGISTERS_TO_FETCH = gl.constexpr(240), gl.constexpr(24)  # a thread


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is made for such channels and taps, and this memory of the weight. x: (b, f, h, w, c)."""
    is_even = len(weight) % _columns(min(_STAGES)) == 0
    return is_half(x, weight) and weight.shape[2:] in ((3, 3), (3, 1, 1)) and is_even and triton_conv.fits(x, weight)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether there are tiles for most processors, too, few pixels outside of images, and the library is no faster."""
    if not fits(x, weight):
        return False
    images, processors = _images(x, weight), num_processors(x.device)
    launches = _launches(_pairs(images), len(weight), pieces_for(x, weight), processors)
    n, lines, pixels, _ = images.shape
    is_faster = weight.dim() == 5 or launches[0].tiles <= _MOST_ROUNDS * processors or launches[0].parts == 1
    computed = _boxes(images) * _LINES * _PIXELS
    is_full = computed <= _MOST_COMPUTED * n * lines * pixels
    busy = sum(launch.tiles * launch.piece for launch in launches) / processors
    there_are = sum(launch.rounds(processors) * launch.piece for launch in launches)
    return is_faster and is_full and busy >= _LEAST_BUSY * there_are


def pieces_for(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """How many columns a piece has in each launch, so that the last rounds of tiles leave few processors idle."""
    steps = weight.numel() // len(weight) // _CHANNELS
    return _best_pieces(_pairs(_images(x, weight)), len(weight), steps, num_processors(x.device))


def conv_over_time(x: Tensor, weight: Tensor, pieces: tuple[int, ...] | None = None) -> Tensor:
    """See `plain.conv_over_time`. Of x's type; `pieces` as of `pieces_for`, if not those."""
    return _conv(_images(x, weight), weight, pieces or pieces_for(x, weight)).unflatten(2, x.shape[2:4])


def conv_frames(x: Tensor, weight: Tensor, pieces: tuple[int, ...] | None = None) -> Tensor:
    """See `plain.conv_frames`. Of x's type; `pieces` as of `pieces_for`, if not those."""
    return _conv(_images(x, weight), weight, pieces or pieces_for(x, weight)).unflatten(0, x.shape[:2])


def _images(x: Tensor, weight: Tensor) -> Tensor:
    """What has lines and pixels: frames or, over time, videos, whose lines are frames. (n, lines, pixels, c)"""
    return x.flatten(0, 1) if weight.dim() == 4 else x.flatten(2, 3)


def _conv(x: Tensor, weight: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """x: (n, lines, pixels, c), weight: (c2, c, 3, 3) or (c2, c, 3, 1, 1) -> (n, lines, pixels, c2)."""
    n, lines, pixels, channels = x.shape
    processors = num_processors(x.device)
    out = x.new_empty(n, lines, pixels, len(weight))
    shifts = weight.shape[3]
    taps = weight.movedim(1, -1).reshape(len(weight), 3 * shifts * channels)  # as they lie in memory
    rows = boxes(x.contiguous(), 1, 2, _PIXELS, _CHANNELS)
    for piece, parts, first, tiles in _launches(_pairs(x), len(weight), pieces, processors):
        _conv_tiles[(min(tiles, processors),)](
            rows, boxes(taps, piece, _CHANNELS), boxes(out, 1, _LINES, _PIXELS, piece),
            first, first + tiles, parts, triton.cdiv(lines, _LINES), triton.cdiv(pixels, _PIXELS),
            shifts * channels // _CHANNELS,
            SHIFTS=shifts, ROW_STAGES=_ROW_STAGES, STAGES=_STAGES[piece], RUNS_AHEAD=_RUNS_AHEAD,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


class _Launch(NamedTuple):
    """Tiles from a first one on, of a pair of boxes with one of so many parts of the columns."""

    piece: int  # columns
    parts: int
    first: int
    tiles: int

    def rounds(self, processors: int) -> int:
        return int(triton.cdiv(self.tiles, processors))


def _launches(pairs: int, columns: int, pieces: tuple[int, ...], processors: int) -> list[_Launch]:
    """One for each size of pieces: all but the last have as many pairs of boxes as make whole rounds of their tiles."""
    launches: list[_Launch] = []
    done = 0
    for piece in pieces:
        parts = columns // _columns(piece)
        rest = pairs - done
        if piece != pieces[-1]:
            rest = rest * parts // processors * processors // parts
        if rest > 0:
            launches.append(_Launch(piece, parts, done * parts, rest * parts))
        done += rest
    return launches


@lru_cache(maxsize=1024)
def _best_pieces(pairs: int, columns: int, steps: int, processors: int) -> tuple[int, ...]:
    def time(pieces: tuple[int, ...]) -> float:
        return sum(
            _LAUNCH_COLUMNS + steps * launch.rounds(processors) * launch.piece / _WORTH[launch.piece]
            for launch in _launches(pairs, columns, pieces, processors)
        )

    return min((pieces for pieces in _LAUNCHES if columns % _columns(max(pieces)) == 0), key=time)


def _columns(piece: int) -> int:
    """Of a tile."""
    return int(_PIECES.value * piece)


def _pairs(x: Tensor) -> int:
    """Of boxes: a tile has one for each group."""
    return int(triton.cdiv(_boxes(x), 2))


def _boxes(x: Tensor) -> int:
    n, lines, pixels, _ = x.shape
    return n * triton.cdiv(lines, _LINES) * triton.cdiv(pixels, _PIXELS)


@gluon.jit(do_not_specialize=("start", "end", "parts", "boxes_l", "boxes_p", "steps"))
def _conv_tiles(
    x, weight, out, start, end, parts, boxes_l, boxes_p, steps,
    SHIFTS: gl.constexpr, ROW_STAGES: gl.constexpr, STAGES: gl.constexpr, RUNS_AHEAD: gl.constexpr,
):  # fmt: skip
    """A tile is a box of lines and pixels for each of two groups, with one of so many parts of the columns.

    Of all tiles, those from `start` to `end` are computed.
    """
    PIXELS: gl.constexpr = x.block_type.shape[2]
    CHANNELS: gl.constexpr = x.block_type.shape[3]
    PIECE: gl.constexpr = weight.block_type.shape[0]
    rows = gl.allocate_shared_memory(x.dtype, [ROW_STAGES * 2 * _ROOM_PAIRS, 1, 2, PIXELS, CHANNELS], x.layout)
    stages = gl.allocate_shared_memory(weight.dtype, [STAGES * _PIECES, PIECE, CHANNELS], weight.layout)
    of_rows = (barriers(ROW_STAGES, 1), barriers(ROW_STAGES, 2))
    of_weight = (barriers(STAGES, 1), barriers(STAGES, 2))
    cut, of_boxes = (start, end, parts, steps), (boxes_l, boxes_p)
    gl.warp_specialize(
        [
            (_one_group, (0, out, rows, of_rows, stages, of_weight, cut, of_boxes, RUNS_AHEAD)),
            (_one_group, (1, out, rows, of_rows, stages, of_weight, cut, of_boxes, RUNS_AHEAD)),
            (_fetch_rows, (x, rows, of_rows, cut, of_boxes, SHIFTS)),
            (_fetch_weight, (weight, stages, of_weight, cut, SHIFTS)),
        ],
        [4, 1, 1],
        [_REGISTERS_TO_MULTIPLY, _REGISTERS_TO_FETCH, _REGISTERS_TO_FETCH],
    )


@gluon.jit
def _place(box, of_boxes, LINES: gl.constexpr, PIXELS: gl.constexpr):
    """The image, the first line and the first pixel."""
    boxes_l, boxes_p = of_boxes
    return box // (boxes_l * boxes_p), box % boxes_l * LINES, box // boxes_l % boxes_p * PIXELS


@gluon.jit
def _fetch_rows(x, rows, of_rows, cut, of_boxes, SHIFTS: gl.constexpr):
    full, free = of_rows
    start, end, parts, steps = cut
    STAGES: gl.constexpr = full.shape[0]
    PIXELS: gl.constexpr = x.block_type.shape[2]
    CHANNELS: gl.constexpr = x.block_type.shape[3]
    done = 0
    for tile in range(start + gl.program_id(0), end, gl.num_programs(0)):
        first = tile // parts * 2
        places = (_place(first, of_boxes, _BOX_LINES, PIXELS), _place(first + 1, of_boxes, _BOX_LINES, PIXELS))
        for step in range(steps):
            shift, channel = step % SHIFTS - SHIFTS // 2, step // SHIFTS * CHANNELS
            stage = done % STAGES
            mbarrier.wait(free.index(stage), done // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), 2 * _FETCHED_PAIRS * x.block_type.nbytes)
            for group in gl.static_range(2):
                image, line, pixel = places[group]
                for i in gl.static_range(_FETCHED_PAIRS):
                    place = [image, line - 1 + 2 * i, pixel + shift, channel]
                    fetch(x, place, full.index(stage), rows.index((stage * 2 + group) * _ROOM_PAIRS + i))
            done += 1


@gluon.jit
def _fetch_weight(weight, stages, of_weight, cut, SHIFTS: gl.constexpr):
    full, free = of_weight
    start, end, parts, steps = cut
    STAGES: gl.constexpr = full.shape[0]
    PIECE: gl.constexpr = weight.block_type.shape[0]
    CHANNELS: gl.constexpr = weight.block_type.shape[1]
    done = 0
    for tile in range(start + gl.program_id(0), end, gl.num_programs(0)):
        for i in range(3 * steps):
            stage = done % STAGES
            mbarrier.wait(free.index(stage), done // STAGES & 1 ^ 1)
            mbarrier.expect(full.index(stage), _PIECES * weight.block_type.nbytes)
            tap, step = i % 3, i // 3
            channels = (tap * SHIFTS + step % SHIFTS) * (steps // SHIFTS) + step // SHIFTS
            for n in gl.static_range(_PIECES):
                place = [(tile % parts * _PIECES + n) * PIECE, channels * CHANNELS]
                fetch(weight, place, full.index(stage), stages.index(stage * _PIECES + n))
            done += 1


@gluon.jit
def _one_group(group, out, rows, of_rows, stages, of_weight, cut, of_boxes, RUNS_AHEAD: gl.constexpr):
    start, end, parts, steps = cut
    full, free = of_rows
    STAGES: gl.constexpr = full.shape[0]
    PIECE: gl.constexpr = out.block_type.shape[3]
    done = 0  # steps
    for tile in range(start + gl.program_id(0), end, gl.num_programs(0)):
        sums = _nothing(PIECE)
        for step in range(steps):
            stage = done % STAGES
            mbarrier.wait(full.index(stage), done // STAGES & 1)
            ours = stage * 2 + group
            f0 = _factor(rows, ours, 0, PIECE)
            sums = _multiply(f0, stages, of_weight, 3 * done, sums, RUNS_AHEAD)
            f1 = _factor(rows, ours, 1, PIECE)
            sums = _multiply(f1, stages, of_weight, 3 * done + 1, sums, RUNS_AHEAD)
            if RUNS_AHEAD:
                f0 = warpgroup_mma_wait(_PIECES, deps=[f0])
            _free(of_weight, 3 * done)
            f2 = _factor(rows, ours, 2, PIECE)
            if step + 1 < steps:
                mbarrier.arrive(free.index(stage))
            sums = _multiply(f2, stages, of_weight, 3 * done + 2, sums, RUNS_AHEAD)
            if RUNS_AHEAD:
                f1 = warpgroup_mma_wait(_PIECES, deps=[f1])
            _free(of_weight, 3 * done + 1)
            sums = warpgroup_mma_wait(0, deps=sums + (f2,))[:_PIECES]
            _free(of_weight, 3 * done + 2)
            done += 1

        # What is written leaves from where the last rows were.
        last = (done - 1) % STAGES
        place = _place(tile // parts * 2 + group, of_boxes, out.block_type.shape[1], out.block_type.shape[2])
        for n in gl.static_range(_PIECES):
            _put(out, place, (tile % parts * _PIECES + n) * PIECE, rows, last * 2 + group, n, sums[n])
        tma.store_wait(0)
        mbarrier.arrive(free.index(last))


@gluon.jit
def _nothing(PIECE: gl.constexpr):
    """The sums before there are any products."""
    sums = ()
    for _ in gl.static_range(_PIECES):
        sums = sums + (gl.zeros([64, PIECE], gl.float32, sums_of(PIECE)),)
    return sums


@gluon.jit
def _factor(rows, ours, TAP: gl.constexpr, PIECE: gl.constexpr):
    """What a tap reads of our lines: as many as a box has, one after the other."""
    PIXELS: gl.constexpr = rows.shape[3]
    CHANNELS: gl.constexpr = rows.shape[4]
    BOXES: gl.constexpr = rows.shape[0] // _ROOM_PAIRS
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    lines = seen_as(rows, rows.dtype, [2 * rows.shape[0], PIXELS, CHANNELS], layout)
    windows = from_on(lines, TAP, [2 * BOXES - 1, _BOX_LINES * PIXELS, CHANNELS], layout)  # two to our room
    return windows.index(2 * ours).load(gl.DotOperandLayout(operand_index=0, parent=sums_of(PIECE), k_width=2))


@gluon.jit
def _multiply(factor, stages, of_weight, number, sums, RUNS_AHEAD: gl.constexpr):
    """The products with the `number`th part of the weight."""
    STAGES: gl.constexpr = of_weight[0].shape[0]
    stage = number % STAGES
    mbarrier.wait(of_weight[0].index(stage), number // STAGES & 1)
    products = ()
    for n in gl.static_range(_PIECES):
        columns = stages.index(stage * _PIECES + n).permute([1, 0])
        products = products + (warpgroup_mma(factor, columns, sums[n], is_async=True),)
        if n > 0 and not RUNS_AHEAD:
            products = products[: n - 1] + (all_but(1, products[n - 1]), products[n])
    if not RUNS_AHEAD:
        products = products[: _PIECES - 1] + (all_but(0, products[_PIECES - 1]),)
    return products


@gluon.jit
def _free(of_weight, number):
    """The `number`th part of the weight is used up."""
    mbarrier.arrive(of_weight[1].index(number % of_weight[1].shape[0]))


@gluon.jit
def _put(out, place, column, rows, ours, N: gl.constexpr, sums):
    """The `N`th piece of a tile's columns."""
    PIECE: gl.constexpr = sums.shape[1]
    ROOM: gl.constexpr = 128 // PIECE  # pieces in one place
    image, line, pixel = place
    PLACES: gl.constexpr = rows.shape[0] // _ROOM_PAIRS * ROOM
    SHAPE: gl.constexpr = [PLACES, 1, out.block_type.shape[1], out.block_type.shape[2], PIECE]
    piece = seen_as(rows, out.dtype, SHAPE, out.layout).index(ours * ROOM + N % ROOM)
    if N >= ROOM:
        tma.store_wait(ROOM - 1)
    piece.reshape(sums.shape).store(sums.to(out.dtype))
    fence_async_shared()
    put(out, [image, line, pixel, column], piece)
