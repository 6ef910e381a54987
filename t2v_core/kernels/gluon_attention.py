"""Attention of the pixels of a frame to each other.

As in FlashAttention-3 (Shah et al. 2024), groups of warps with 64 queries each share the keys and values that a single
warp fetches, and take turns at the multipliers, so that some weigh while another's products are under way.

Otherwise than there, what is subtracted from a query's scores before they become powers of two is settled by the first
block of keys, those nearest to it. The result is the same whatever it is, unless a power overflows; and to look for a
larger score in each block, and to make the sums smaller where there is one, took a seventh of the time. Where scores
are so much larger than those of the first block, a sum is infinite: then the program does its queries again, and looks.

For Hopper GPUs, half precision and heads of 64 channels.
"""

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

from t2v_core.kernels.gluon_hopper import barriers, boxes, fetch, is_half, put, sums_of
from t2v_core.kernels.triton_instructions import LOG2_E, exp2

_HEAD_DIM = 64
_QUERIES, _GROUPS = 64, 3  # of a group, and groups of a program, which starts each by name
_KEYS, _STAGES = 128, 4
# On an H200: 9.2 ms where cuDNN takes 11.6, of 48 frames of 9216 pixels and 5 heads; 1.33 and 1.53 of 2304 and 10;
# 0.25 and 0.28 of 576 and 20. But 0.88 where cuDNN takes 0.82, of 256 frames of 1024 and 5: a ninth of what programs
# compute for those is for nothing.
_MIN_TOKENS, _LEAST_FILLED = 576, 0.9
# The first block's weights are 2^-8 at most, so that others may be 2^24 times as large in half precision. Below 2^-14
# they have fewer digits, of which sums tell nothing: their error is the same with 0 here, and grows from 10 on.
_HEADROOM = gl.constexpr(8.0)
_REGISTERS_TO_WEIGH, _REGISTERS_TO_FETCH = gl.constexpr(160), gl.constexpr(24)  # a thread


def fits(qkv: Tensor, heads: int) -> bool:
    """Whether the kernel is made for such heads."""
    return is_half(qkv) and qkv.shape[-1] == 3 * heads * _HEAD_DIM


def pays(qkv: Tensor, heads: int) -> bool:
    """Whether it is faster than the library, too: where there are many pixels, which fill most programs."""
    tokens = qkv.shape[2] * qkv.shape[3]
    computed = triton.cdiv(tokens, _GROUPS * _QUERIES) * _GROUPS * _QUERIES
    return fits(qkv, heads) and tokens >= max(_MIN_TOKENS, _LEAST_FILLED * computed)


def spatial_attention(qkv: Tensor, heads: int) -> Tensor:
    """See `plain.spatial_attention`."""
    b, f, h, w, _ = qkv.shape
    tokens = h * w
    out = qkv.new_empty(b, f, h, w, heads * _HEAD_DIM)
    frames, out_frames = qkv.contiguous().view(b * f, tokens, -1), out.view(b * f, tokens, -1)
    _attend_over_pixels[(triton.cdiv(tokens, _GROUPS * _QUERIES), heads, b * f)](
        boxes(frames, 1, _QUERIES, _HEAD_DIM),
        boxes(frames, 1, _KEYS, _HEAD_DIM),
        boxes(out_frames, 1, _QUERIES, _HEAD_DIM),
        tokens, LOG2_E / _HEAD_DIM**0.5,
        GROUPS=_GROUPS, STAGES=_STAGES, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@gluon.jit(do_not_specialize=("tokens",))
def _attend_over_pixels(queries, keys_values, out, tokens, scale, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    QUERIES: gl.constexpr = queries.block_type.shape[1]
    KEYS: gl.constexpr = keys_values.block_type.shape[1]
    C: gl.constexpr = keys_values.block_type.shape[2]
    q = gl.allocate_shared_memory(out.dtype, [GROUPS, 1, QUERIES, C], queries.layout)
    k = gl.allocate_shared_memory(out.dtype, [STAGES, 1, KEYS, C], keys_values.layout)
    v = gl.allocate_shared_memory(out.dtype, [STAGES, 1, KEYS, C], keys_values.layout)
    infinite = gl.allocate_shared_memory(gl.float32, [GROUPS, QUERIES], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_full, full, free, turns = barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(GROUPS, 1)
    shared, signals = (q, k, v, infinite), (q_full, full, free, barriers(1, GROUPS))
    gl.warp_specialize(
        [
            (_attend, (0, out, tokens, scale, shared, signals, turns)),
            (_attend, (1, out, tokens, scale, shared, signals, turns)),
            (_attend, (2, out, tokens, scale, shared, signals, turns)),
            (_fetch_all, (queries, keys_values, tokens, shared, signals)),
        ],
        [4, 4, 1],
        [_REGISTERS_TO_WEIGH, _REGISTERS_TO_WEIGH, _REGISTERS_TO_FETCH],
    )


@gluon.jit
def _blocks_of(tokens, GROUPS: gl.constexpr, QUERIES: gl.constexpr, KEYS: gl.constexpr):
    """How many of keys there are, and which comes first: of the keys nearest to the program's queries, or the last one,
    if it has fewer than the others.
    """
    blocks = (tokens + KEYS - 1) // KEYS
    nearest = min((2 * gl.program_id(0) + 1) * GROUPS * QUERIES // (2 * KEYS), blocks - 1)
    first = nearest if tokens % KEYS == 0 else blocks - 1
    return blocks, first


@gluon.jit
def _fetch_all(queries, keys_values, tokens, shared, signals):
    q, k, v, infinite = shared
    q_full, full, free, looked = signals
    GROUPS: gl.constexpr = q.shape[0]
    QUERIES: gl.constexpr = q.shape[2]
    KEYS: gl.constexpr = k.shape[2]
    C: gl.constexpr = k.shape[3]
    image, head = gl.program_id(2), gl.program_id(1)
    mbarrier.expect(q_full.index(0), GROUPS * queries.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        row = (gl.program_id(0) * GROUPS + group) * QUERIES
        fetch(queries, [image, row, head * C], q_full.index(0), q.index(group))
    blocks, first = _blocks_of(tokens, GROUPS, QUERIES, KEYS)
    _fetch_blocks(0, first, blocks, keys_values, k, v, full, free)
    mbarrier.wait(looked.index(0), 0)
    if _any_of(infinite, gl.BlockedLayout([2], [32], [1], [0])):
        _fetch_blocks(blocks + 1, first, blocks, keys_values, k, v, full, free)


@gluon.jit
def _fetch_blocks(start, first, blocks, keys_values, k, v, full, free):
    """The keys of each block with the values of the block before; the first values and the last keys, for nothing."""
    STAGES: gl.constexpr = k.shape[0]
    KEYS: gl.constexpr = k.shape[2]
    C: gl.constexpr = k.shape[3]
    image, head, heads = gl.program_id(2), gl.program_id(1), gl.num_programs(1)
    for i in range(blocks + 1):
        stage, phase = (start + i) % STAGES, (start + i) // STAGES & 1 ^ 1
        mbarrier.wait(free.index(stage), phase)
        mbarrier.expect(full.index(stage), 2 * keys_values.block_type.nbytes)
        row, row_before = (first + i) % blocks * KEYS, (first + blocks + i - 1) % blocks * KEYS
        fetch(keys_values, [image, row, (heads + head) * C], full.index(stage), k.index(stage))
        fetch(keys_values, [image, row_before, (2 * heads + head) * C], full.index(stage), v.index(stage))


@gluon.jit
def _attend(group, out, tokens, scale, shared, signals, turns):
    """softmax(q k^T scale) v of a group's queries."""
    q, k, v, infinite = shared
    q_full, full, free, looked = signals
    QUERIES: gl.constexpr = q.shape[2]
    KEYS: gl.constexpr = k.shape[2]
    C: gl.constexpr = q.shape[3]
    of_rows: gl.constexpr = gl.SliceLayout(1, sums_of(C))
    ours = q.index(group).reshape([QUERIES, C])
    mbarrier.wait(q_full.index(0), 0)
    blocks, first = _blocks_of(tokens, q.shape[0], QUERIES, KEYS)
    total, norm = _weigh(0, False, group, ours, tokens, blocks, first, scale, k, v, full, free, turns)
    is_infinite = gl.maximum(gl.max(_is_infinite(total), 1), _is_infinite(norm))
    infinite.index(group).store(is_infinite)
    mbarrier.arrive(looked.index(0))
    mbarrier.wait(looked.index(0), 0)
    if _any_of(infinite, of_rows):
        total, norm = _weigh(blocks + 1, True, group, ours, tokens, blocks, first, scale, k, v, full, free, turns)
    total /= gl.expand_dims(norm, 1)
    ours.store(total.to(out.dtype))  # in place of the queries, which are done with
    fence_async_shared()
    row = (gl.program_id(0) * q.shape[0] + group) * QUERIES
    put(out, [gl.program_id(2), row, gl.program_id(1) * C], q.index(group))
    tma.store_wait(0)


@gluon.jit
def _weigh(start, LOOKS: gl.constexpr, group, ours, tokens, blocks, first, scale, k, v, full, free, turns):
    """The values' sum by their weights, powers of two, and the weights' sum.

    LOOKS: for larger scores in each block. start: what has been fetched before.
    """
    GROUPS: gl.constexpr = turns.shape[0]
    QUERIES: gl.constexpr = ours.shape[0]
    STAGES: gl.constexpr = k.shape[0]
    KEYS: gl.constexpr = k.shape[2]
    C: gl.constexpr = k.shape[3]
    of_keys: gl.constexpr = sums_of(KEYS)
    of_channels: gl.constexpr = sums_of(C)
    as_factor: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=of_channels, k_width=2)
    nothing = gl.zeros([QUERIES, KEYS], gl.float32, of_keys)
    total = gl.zeros([QUERIES, C], gl.float32, of_channels)

    stage = start % STAGES
    mbarrier.wait(full.index(stage), start // STAGES & 1)
    _take_turn(turns, group, start)
    scores = warpgroup_mma(ours, _transposed(k.index(stage)), nothing, use_acc=False, is_async=True)
    mbarrier.arrive(turns.index((group + 1) % GROUPS))
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(free.index(stage))
    key = first * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, of_keys))
    scores = gl.where(gl.expand_dims(key < tokens, 0), scores, float("-inf"))
    subtracted = gl.max(scores, 1) * scale
    if not LOOKS:
        subtracted += _HEADROOM
    weights = exp2(scores * scale - gl.expand_dims(subtracted, 1))
    norm = _sums(weights, LOOKS)
    packed = _packed(weights.to(ours.dtype))

    for i in range(1, blocks):
        stage = (start + i) % STAGES
        factor = gl.convert_layout(_unpacked(packed, ours), as_factor)
        mbarrier.wait(full.index(stage), (start + i) // STAGES & 1)
        _take_turn(turns, group, start + i)
        scores = warpgroup_mma(ours, _transposed(k.index(stage)), nothing, use_acc=False, is_async=True)
        total = warpgroup_mma(factor, v.index(stage).reshape([KEYS, C]), total, is_async=True)
        mbarrier.arrive(turns.index((group + 1) % GROUPS))
        scores, total, factor = warpgroup_mma_wait(0, deps=[scores, total, factor])
        mbarrier.arrive(free.index(stage))
        weights, subtracted, norm, total = _next_weights(scores, scale, subtracted, norm, total, LOOKS)
        packed = _packed(weights.to(ours.dtype))

    factor = gl.convert_layout(_unpacked(packed, ours), as_factor)
    stage = (start + blocks) % STAGES
    mbarrier.wait(full.index(stage), (start + blocks) // STAGES & 1)
    _take_turn(turns, group, start + blocks)
    total = warpgroup_mma(factor, v.index(stage).reshape([KEYS, C]), total, is_async=True)
    mbarrier.arrive(turns.index((group + 1) % GROUPS))
    total, factor = warpgroup_mma_wait(0, deps=[total, factor])
    mbarrier.arrive(free.index(stage))
    if not LOOKS:
        norm = gl.sum(norm, 1)
    return total, gl.convert_layout(norm, gl.SliceLayout(1, of_channels))


@gluon.jit
def _next_weights(scores, scale, subtracted, norm, total, LOOKS: gl.constexpr):
    """Of a block of keys; and the sums, less by what is subtracted more."""
    if LOOKS:
        larger = gl.maximum(subtracted, gl.max(scores, 1) * scale)
        shrunk = exp2(subtracted - larger)
        norm *= shrunk
        total *= gl.expand_dims(gl.convert_layout(shrunk, gl.SliceLayout(1, sums_of(total.shape[1]))), 1)
        subtracted = larger
    weights = exp2(scores * scale - gl.expand_dims(subtracted, 1))
    return weights, subtracted, norm + _sums(weights, LOOKS), total


@gluon.jit
def _take_turn(turns, group, n):
    """Wait until the group before has asked for its products; the first one, until the last has for those before."""
    phase = n & 1 ^ (1 if group == 0 else 0)
    mbarrier.wait(turns.index(group), phase)  # for speed alone


@gluon.jit
def _sums(weights, WHOLE: gl.constexpr):
    """Of rows; or in four parts, which are what each thread has of them."""
    if WHOLE:
        sums = gl.sum(weights, 1)
    else:
        of_thread = weights.reshape([weights.shape[0], weights.shape[1] // 8, 4, 2])
        sums = gl.sum(gl.sum(of_thread, 3), 1)
    return sums


@gluon.jit
def _is_infinite(x):
    """1 for what is no finite number, and else 0."""
    return gl.where(gl.abs(x) < float("inf"), 0.0, 1.0)


@gluon.jit
def _any_of(marks, layout: gl.constexpr):
    """Whether one of them is not zero. marks: (groups, queries)."""
    GROUPS: gl.constexpr = marks.shape[0]
    largest = marks.index(0).load(layout)
    for group in gl.static_range(1, GROUPS):
        largest = gl.maximum(largest, marks.index(group).load(layout))
    return gl.max(largest, 0) > 0


@gluon.jit
def _transposed(keys):
    return keys.reshape([keys.shape[1], keys.shape[2]]).permute([1, 0])


@gluon.jit
def _packed(halves):
    """Neighbours in pairs, as one number each: half as many that a loop carries, and nothing to do for it."""
    even, odd = halves.reshape([halves.shape[0], halves.shape[1] // 2, 2]).split()
    return gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _unpacked(packed, like):
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(like.dtype, like.dtype), is_pure=True, pack=1
    )
    return gl.join(even, odd).reshape([packed.shape[0], 2 * packed.shape[1]])
