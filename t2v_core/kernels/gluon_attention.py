"""Attention of the pixels of a frame to each other.

As FlashAttention-3 does it (Shah et al. 2024): groups of warps, with 64 queries each, share the keys and values that a
single warp fetches. A group weighs one block of keys while its products with the block before are under way, and the
groups' turns at the multipliers fall between each other's. For Hopper GPUs, half precision and heads of 64 channels.
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

from t2v_core.kernels.gluon_hopper import barriers, boxes, fetch, fetch_once_free, is_half, put, sums_of

_HEAD_DIM = 64
_QUERIES, _GROUPS = 64, 3  # of a group, and groups of a program
_KEYS, _STAGES = 128, 4
# On an H200: 10.7 ms where cuDNN takes 11.8, of 48 frames of 9216 pixels and 5 heads; 1.5 as cuDNN, of 2304 and 10;
# 0.95 where cuDNN takes 0.86, of 256 frames of 1024 and 5.
_MIN_TOKENS = 2304
_LOG2_E = 1.4426950408889634
_REGISTERS_TO_MULTIPLY, _REGISTERS_TO_FETCH = gl.constexpr(160), gl.constexpr(24)  # a thread


def fits(qkv: Tensor, heads: int) -> bool:
    """Whether the kernel is made for such heads."""
    return is_half(qkv) and qkv.shape[-1] == 3 * heads * _HEAD_DIM


def pays(qkv: Tensor, heads: int) -> bool:
    """Whether it is faster than the library, too: where there are many pixels."""
    return fits(qkv, heads) and qkv.shape[2] * qkv.shape[3] >= _MIN_TOKENS


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
        tokens, _LOG2_E / _HEAD_DIM**0.5,
        GROUPS=_GROUPS, STAGES=_STAGES, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@gluon.jit
def _attend_over_pixels(queries, keys_values, out, tokens, scale, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    QUERIES: gl.constexpr = queries.block_type.shape[1]
    KEYS: gl.constexpr = keys_values.block_type.shape[1]
    C: gl.constexpr = keys_values.block_type.shape[2]
    q = gl.allocate_shared_memory(out.dtype, [GROUPS, 1, QUERIES, C], queries.layout)
    k = gl.allocate_shared_memory(out.dtype, [STAGES, 1, KEYS, C], keys_values.layout)
    v = gl.allocate_shared_memory(out.dtype, [STAGES, 1, KEYS, C], keys_values.layout)
    full = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    free = (barriers(STAGES, GROUPS), barriers(STAGES, GROUPS))
    fetched = (q, k, v)
    gl.warp_specialize(
        [
            (_weigh, (0, out, tokens, scale, fetched, full, free)),
            (_weigh, (1, out, tokens, scale, fetched, full, free)),
            (_weigh, (2, out, tokens, scale, fetched, full, free)),
            (_fetch_all, (queries, keys_values, tokens, fetched, full, free)),
        ],
        [4, 4, 1],
        [_REGISTERS_TO_MULTIPLY, _REGISTERS_TO_MULTIPLY, _REGISTERS_TO_FETCH],
    )


@gluon.jit
def _fetch_all(queries, keys_values, tokens, fetched, full, free):
    """Blocks of keys from the last one on, which alone may have fewer than the others."""
    q, k, v = fetched
    q_full, k_full, v_full = full
    k_free, v_free = free
    GROUPS: gl.constexpr = q.shape[0]
    QUERIES: gl.constexpr = q.shape[2]
    STAGES: gl.constexpr = k.shape[0]
    KEYS: gl.constexpr = k.shape[2]
    C: gl.constexpr = k.shape[3]
    image, head, heads = gl.program_id(2), gl.program_id(1), gl.num_programs(1)
    mbarrier.expect(q_full.index(0), GROUPS * queries.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        row = (gl.program_id(0) * GROUPS + group) * QUERIES
        fetch(queries, [image, row, head * C], q_full.index(0), q.index(group))
    blocks = (tokens + KEYS - 1) // KEYS
    for i in range(blocks):
        stage, phase, row = i % STAGES, i // STAGES & 1 ^ 1, (blocks - 1 - i) * KEYS
        place = [image, row, (heads + head) * C]
        fetch_once_free(keys_values, place, k_free.index(stage), phase, k_full.index(stage), k.index(stage))
        place = [image, row, (2 * heads + head) * C]
        fetch_once_free(keys_values, place, v_free.index(stage), phase, v_full.index(stage), v.index(stage))


@gluon.jit
def _weigh(group, out, tokens, scale, fetched, full, free):
    """softmax(q k^T scale) v of a group's queries, in powers of two, by blocks of keys."""
    q, k, v = fetched
    q_full, k_full, v_full = full
    k_free, v_free = free
    GROUPS: gl.constexpr = q.shape[0]
    QUERIES: gl.constexpr = q.shape[2]
    STAGES: gl.constexpr = k.shape[0]
    KEYS: gl.constexpr = k.shape[2]
    C: gl.constexpr = k.shape[3]
    of_keys: gl.constexpr = sums_of(KEYS)
    of_channels: gl.constexpr = sums_of(C)
    as_factor: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=of_channels, k_width=2)
    ours = q.index(group).reshape([QUERIES, C])
    nothing = gl.zeros([QUERIES, KEYS], gl.float32, of_keys)
    total = gl.zeros([QUERIES, C], gl.float32, of_channels)
    blocks = (tokens + KEYS - 1) // KEYS

    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(ours, _transposed(k.index(0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(0))
    key = (blocks - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, of_keys))
    scores = gl.where(gl.expand_dims(key < tokens, 0), scores, float("-inf"))
    largest = gl.max(scores, 1) * scale
    weights = _exp2(scores * scale - gl.expand_dims(largest, 1))
    norm = gl.sum(weights, 1)
    factor = gl.convert_layout(weights.to(out.dtype), as_factor)

    for i in range(1, blocks):
        stage, before = i % STAGES, (i - 1) % STAGES
        mbarrier.wait(k_full.index(stage), i // STAGES & 1)
        scores = warpgroup_mma(ours, _transposed(k.index(stage)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
        total = warpgroup_mma(factor, v.index(before).reshape([KEYS, C]), total, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage))
        larger = gl.maximum(largest, gl.max(scores, 1) * scale)
        weights = _exp2(scores * scale - gl.expand_dims(larger, 1))
        shrunk = _exp2(largest - larger)
        norm = norm * shrunk + gl.sum(weights, 1)
        largest = larger
        total, factor = warpgroup_mma_wait(0, deps=[total, factor])
        mbarrier.arrive(v_free.index(before))
        factor = gl.convert_layout(weights.to(out.dtype), as_factor)
        total *= gl.expand_dims(gl.convert_layout(shrunk, gl.SliceLayout(1, of_channels)), 1)

    last = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(last), (blocks - 1) // STAGES & 1)
    total = warpgroup_mma(factor, v.index(last).reshape([KEYS, C]), total, is_async=True)
    total, factor = warpgroup_mma_wait(0, deps=[total, factor])
    total /= gl.expand_dims(gl.convert_layout(norm, gl.SliceLayout(1, of_channels)), 1)
    ours.store(total.to(out.dtype))  # in place of the queries, which are done with
    fence_async_shared()
    row = (gl.program_id(0) * GROUPS + group) * QUERIES
    put(out, [gl.program_id(2), row, gl.program_id(1) * C], q.index(group))
    tma.store_wait(0)


@gluon.jit
def _transposed(keys):
    return keys.reshape([keys.shape[1], keys.shape[2]]).permute([1, 0])


@gluon.jit
def _exp2(x):
    """In one instruction."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
