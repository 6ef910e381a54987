"""Each Triton kernel gives what its plain PyTorch equivalent gives in float64, on random shapes and values.

On a GPU, or in Triton's interpreter where TRITON_INTERPRET=1 is set before anything is imported: then without one.
"""

import pytest
import torch
from kernel_checks import DEVICE, HALVES, IS_INTERPRETED, TOLERANCES, assert_close, draw, randomised
from torch import nn

from t2v_core.kernels import plain
from t2v_core.kernels.fp8 import FP8, WEIGHT_SCALE, quantised, to_fp8

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(
        not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
    ),
]
# Hopper adds products of fp8 with fewer bits than float32 has; the interpreter does not.
FP8_SUM_TOLERANCE = TOLERANCES[torch.float16] if IS_INTERPRETED else 2e-3
needs_hopper = pytest.mark.skipif(
    not IS_INTERPRETED and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0)),
    reason="needs a Hopper GPU, or TRITON_INTERPRET=1",
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)


@every_dtype
@pytest.mark.parametrize("over_frames", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 3, 4, 5, 40), 4),
        ((2, 3, 4, 5, 160), 4),  # groups that one program holds whole
        ((1, 5, 16, 40, 30), 3),
        ((1, 3, 11, 12, 320), 32),
        ((1, 1, 1, 1, 64), 2),
    ],
)
def test_group_norm(shape, groups, silu, over_frames, dtype):
    from t2v_core.kernels import triton_group_norm as fast

    if IS_INTERPRETED and shape[-1] == 320 and not (silu and over_frames and dtype == torch.float16):
        shape, groups = (*shape[:-1], 40), 4  # an eighth of the programs, which do the same
    x, delta = draw(*shape, dtype=dtype, mean=1.0), draw(*shape, dtype=dtype)
    norm = randomised(nn.GroupNorm(groups, shape[-1]), dtype)
    how = {"over_frames": over_frames, "silu": silu}
    offsets = None, draw(shape[0], shape[-1], dtype=dtype), draw(1, shape[-1], dtype=dtype)
    for offset in offsets:
        actual = fast.group_norm(x, norm, **how, offset=offset)
        exact = plain.group_norm(x.double(), norm.double(), **how, offset=None if offset is None else offset.double())
        assert_close(actual, exact, dtype)
        norm.to(dtype)
    for offset in (None, draw(shape[-1], dtype=dtype)):
        actual = fast.add_group_norm(x, delta, offset, norm, **how)
        exact_offset = None if offset is None else offset.double()
        exact = plain.add_group_norm(x.double(), delta.double(), exact_offset, norm.double(), **how)
        for ours, expected in zip(actual, exact, strict=True):
            assert_close(ours, expected, dtype)
        norm.to(dtype)


@every_dtype
@pytest.mark.parametrize(
    ("shape", "groups", "out_channels", "bias"),
    [
        ((2, 3, 7, 9, 40), 4, 3, True),
        ((1, 2, 16, 24, 128), 32, 3, True),
        ((1, 1, 1, 1, 320), 32, 4, True),
        ((1, 2, 12, 40, 96), 4, 8, False),
    ],
)
def test_group_norm_conv(shape, groups, out_channels, bias, dtype):
    from t2v_core.kernels import triton_norm_conv as fast

    x, delta, offset = draw(*shape, dtype=dtype, mean=1.0), draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype)
    norm = randomised(nn.GroupNorm(groups, shape[-1]), dtype)
    conv = randomised(nn.Conv2d(shape[-1], out_channels, 3, padding=1, bias=bias), dtype)
    nn.init.normal_(conv.weight, 0.0, (9 * shape[-1]) ** -0.5)
    conv.to(memory_format=torch.channels_last)
    assert fast.fits(conv)
    actual = [
        fast.group_norm_conv(x, norm, conv, **sums)
        for sums in ({}, {"delta": delta}, {"delta": delta, "offset": offset})
    ]
    x, delta, offset, norm, conv = (value.double() for value in (x, delta, offset, norm, conv))
    for ours, sums in zip(actual, ({}, {"delta": delta}, {"delta": delta, "offset": offset}), strict=True):
        assert_close(ours, plain.group_norm_conv(x, norm, conv, **sums), dtype)


def test_group_norm_conv_is_for_few_channels_of_the_same_size():
    from t2v_core.kernels import triton_norm_conv as fast

    assert fast.fits(nn.Conv2d(320, 14, 3, padding=1))
    assert not fast.fits(nn.Conv2d(320, 15, 3, padding=1))
    assert not fast.fits(nn.Conv2d(320, 4, 3))
    assert not fast.fits(nn.Conv2d(320, 4, 3, padding=1, stride=2))
    assert not fast.fits(nn.Conv2d(320, 4, 1))


@every_dtype
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 3, 4, 5, 160), 4), ((1, 1, 3, 3, 64), 2), ((3, 2, 1, 1, 96), 3), ((2, 16, 4, 4, 40), 1)]
)
def test_group_norm_unfolded(shape, groups, dtype):
    from t2v_core.kernels import triton_group_norm as fast

    x, delta = draw(*shape, dtype=dtype, mean=1.0), draw(*shape, dtype=dtype)
    norm, offset = randomised(nn.GroupNorm(groups, shape[-1]), dtype), draw(1, shape[-1], dtype=dtype)
    how = {"over_frames": True, "silu": True, "unfold": True}
    assert fast.unfolds(x, norm)
    unfolded = fast.group_norm(x, norm, **how, offset=offset)
    summed = fast.add_group_norm(x, delta, offset[0], norm, **how)
    norm.double()
    assert_close(unfolded, plain.group_norm(x.double(), norm, **how, offset=offset.double()), dtype)
    exact = plain.add_group_norm(x.double(), delta.double(), offset[0].double(), norm, **how)
    for ours, expected in zip(summed, exact, strict=True):
        assert_close(ours, expected, dtype)


@every_dtype
def test_a_convolution_over_time_is_a_product_of_what_is_unfolded(dtype):
    x, weight = draw(2, 5, 3, 2, 24, dtype=dtype), draw(16, 24, 3, 1, 1, dtype=dtype)
    weight = weight.to(memory_format=torch.channels_last_3d)
    exact = plain.conv_over_time(x.double(), weight.double())
    assert_close(plain.conv_over_time(plain.unfolded(x), weight), exact, dtype)


def test_only_groups_that_a_program_holds_are_unfolded():
    from t2v_core.kernels import triton_group_norm as fast

    assert fast.unfolds(torch.empty(1, 16, 4, 4, 1280), nn.GroupNorm(32, 1280))
    assert not fast.unfolds(torch.empty(1, 16, 8, 8, 1280), nn.GroupNorm(32, 1280))
    assert not fast.unfolds(torch.empty(1, 16, 2, 2, 320), nn.GroupNorm(32, 320))


@every_dtype
@pytest.mark.parametrize("over_frames", [False, True])
@pytest.mark.parametrize(
    ("channels", "skip_channels", "groups", "side"),
    # Where groups lie across the seam too; the last ones are read twice, over frames.
    [(40, 20, 4, 4), (64, 36, 4, 20), (640, 320, 32, 6), (128, 64, 4, 12), (128, 64, 4, 16)],
)
def test_group_norm_of_two_inputs_beside_each_other(channels, skip_channels, groups, side, over_frames, dtype):
    from t2v_core.kernels import triton_group_norm as fast

    x, skip = draw(2, 3, side, side, channels, dtype=dtype), draw(2, 3, side, side, skip_channels, dtype=dtype)
    norm = randomised(nn.GroupNorm(groups, channels + skip_channels), dtype)
    actual = fast.group_norm(x, norm, over_frames=over_frames, silu=True, skip=skip)
    exact = plain.group_norm(x.double(), norm.double(), over_frames=over_frames, silu=True, skip=skip.double())
    assert_close(actual, exact, dtype)


@every_dtype
def test_group_norm_of_many_values(dtype, monkeypatch):
    from t2v_core.kernels import triton_group_norm as fast

    monkeypatch.setattr("t2v_core.kernels.triton_group_scales._FEW_VALUES", 0)
    x, norm = draw(1, 1, 33, 32, 256, dtype=dtype, mean=1.0), randomised(nn.GroupNorm(64, 256), dtype)
    actual = fast.group_norm(x, norm, over_frames=False, silu=True)  # by more chunks than few values have
    assert_close(actual, plain.group_norm(x.double(), norm.double(), over_frames=False, silu=True), dtype)


@every_dtype
@pytest.mark.parametrize("over_frames", [False, True])
def test_group_norm_of_groups_that_are_read_twice(over_frames, dtype, monkeypatch):
    from t2v_core.kernels import triton_group_norm as fast

    monkeypatch.setattr(fast, "_WHOLE_GROUP_VALUES", 0)
    monkeypatch.setattr(fast, "_PART_VALUES", 1024)
    x, other = draw(2, 3, 4, 5, 160, dtype=dtype, mean=1.0), draw(2, 3, 4, 5, 160, dtype=dtype)
    offset, how = draw(2, 160, dtype=dtype), {"over_frames": over_frames, "silu": True}
    norm, wide = randomised(nn.GroupNorm(4, 160), dtype), randomised(nn.GroupNorm(4, 320), dtype)
    normed, beside = fast.group_norm(x, norm, **how, offset=offset), fast.group_norm(x, wide, **how, skip=other)
    total, normed_total = fast.add_group_norm(x, other, offset[0], norm, **how)
    x, other, offset, norm, wide = x.double(), other.double(), offset.double(), norm.double(), wide.double()
    assert_close(normed, plain.group_norm(x, norm, **how, offset=offset), dtype)
    assert_close(beside, plain.group_norm(x, wide, **how, skip=other), dtype)
    exact_total, exact_normed = plain.add_group_norm(x, other, offset[0], norm, **how)
    assert_close(total, exact_total, dtype)
    assert_close(normed_total, exact_normed, dtype)


@every_dtype
@pytest.mark.parametrize("channels", [40, 320, 1280])
def test_sums_and_their_layer_norm(channels, dtype):
    from t2v_core.kernels import triton_rows as fast

    x, delta = draw(3, 5, 7, channels, dtype=dtype), draw(3, 5, 7, channels, dtype=dtype)
    offset, norm = draw(channels, dtype=dtype), randomised(nn.LayerNorm(channels), dtype)
    normed, (total, normed_total) = fast.layer_norm(x, norm, offset), fast.add_layer_norm(x, delta, offset, norm)
    beside = torch.zeros(3, 5, 7, 2 * channels, dtype=dtype, device=DEVICE)
    fast.add_layer_norm(x, delta, offset, norm, out=beside[..., channels:])
    assert_close(fast.add(x, delta, offset), x.double() + delta.double() + offset.double(), dtype)
    norm.double()
    assert_close(normed, plain.layer_norm(x.double(), norm, offset.double()), dtype)
    exact_total, exact_normed = plain.add_layer_norm(x.double(), delta.double(), offset.double(), norm)
    assert_close(total, exact_total, dtype)
    assert_close(normed_total, exact_normed, dtype)
    assert torch.equal(beside[..., channels:], total)
    assert not beside[..., :channels].any()


@every_dtype
@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 8), (3, 5, 40), (7, 4, 320)])
def test_quarters_of_corners_become_an_image(height, width, channels, dtype):
    from t2v_core.kernels import triton_rows as fast

    corners = draw(2, 3, height + 1, width + 1, 4 * channels, dtype=dtype)
    bias = draw(channels, dtype=dtype)
    assert_close(fast.join_quarters(corners, bias), plain.join_quarters(corners.double(), bias.double()), dtype)


@every_dtype
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 8), (3, 5, 40), (7, 4, 320)])
def test_group_norm_of_quarters(height, width, channels, silu, dtype):
    from t2v_core.kernels import triton_group_norm as fast

    corners = draw(2, 3, height + 1, width + 1, 4 * channels, dtype=dtype)
    bias, norm = draw(channels, dtype=dtype), randomised(nn.GroupNorm(4, channels), dtype)
    actual = fast.join_quarters_group_norm(corners, bias, norm, silu=silu)
    exact = plain.join_quarters_group_norm(corners.double(), bias.double(), norm.double(), silu=silu)
    for ours, expected in zip(actual, exact, strict=True):
        assert_close(ours, expected, dtype)


@every_dtype
@pytest.mark.parametrize(
    ("num_frames", "height", "width", "heads", "head_dim"),
    [(1, 3, 5, 2, 16), (5, 1, 1, 2, 16), (16, 4, 4, 3, 64), (24, 5, 9, 1, 32), (64, 8, 8, 1, 64), (3, 2, 1, 1, 128)],
)
def test_attention_in_short_sequences(num_frames, height, width, heads, head_dim, dtype):
    from t2v_core.kernels import triton_short_attention as fast

    qkv = draw(2, num_frames, height, width, 3 * heads * head_dim, dtype=dtype)
    assert fast.fits(qkv, heads, tokens=num_frames)
    assert_close(fast.temporal_attention(qkv, heads), plain.temporal_attention(qkv.double(), heads), dtype)
    assert fast.fits(qkv, heads, tokens=height * width)
    assert_close(fast.spatial_attention(qkv, heads), plain.spatial_attention(qkv.double(), heads), dtype)


def test_short_sequences_are_what_a_program_holds():
    from t2v_core.kernels import triton_short_attention as fast

    assert not fast.fits(draw(1, 65, 1, 1, 3 * 64, dtype=torch.float16), heads=1, tokens=65)
    assert not fast.fits(draw(1, 4, 1, 1, 3 * 48, dtype=torch.float16), heads=1, tokens=4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("num_frames", "height", "width", "heads", "head_dim", "tokens"),
    [(1, 1, 1, 1, 16, 1), (2, 5, 7, 3, 64, 77), (3, 16, 24, 2, 64, 77), (1, 20, 20, 1, 128, 128)],
)
@pytest.mark.parametrize(("is_split", "processors"), [(True, 1), (False, 1), (True, 132)])
def test_text_attention(num_frames, height, width, heads, head_dim, tokens, is_split, processors, dtype, monkeypatch):
    from t2v_core.kernels import triton_text_attention as fast

    monkeypatch.setattr(fast, "num_processors", lambda device: processors)
    queries = draw(2, num_frames, height, width, heads * head_dim, dtype=dtype)
    if is_split:  # a view of a projection
        keys, values = (draw(2, tokens, heads, head_dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    else:
        keys, values = (draw(2, heads, tokens, head_dim, dtype=dtype) for _ in range(2))
    assert fast.fits(queries, keys, values)
    exact = plain.text_attention(queries.double(), keys.double(), values.double())
    assert_close(fast.text_attention(queries, keys, values), exact, dtype)


def test_text_attention_is_for_texts_that_fit_into_a_program():
    from t2v_core.kernels import triton_text_attention as fast

    queries, keys = torch.empty(1, 1, 1, 1, 64).half(), torch.empty(1, 1, 77, 64).half()
    assert fast.fits(queries, keys, keys)
    assert not fast.fits(queries.float(), keys.float(), keys.float())
    assert not fast.fits(queries, keys, keys.mT.contiguous().mT)
    for size in ((129, 64), (77, 48)):
        assert not fast.fits(queries, *2 * [torch.empty(1, 1, *size).half()])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("images", "tokens", "most_scores"),
    [(3, 40, 2**25), (3, 40, 2 * 40 * 40), (2, 100, 30 * 100), (1, 33, 1)],
    ids=["all at once", "some images", "some queries", "one query"],
)
def test_single_head_attention(images, tokens, most_scores, dtype):
    from t2v_core.kernels import triton_wide_attention as fast

    q, k, v = (draw(images, tokens, 264, dtype=dtype) for _ in range(3))
    assert fast.pays(q)
    actual = fast.single_head_attention(q, k, v, most_scores)
    assert_close(actual, plain.single_head_attention(q.double(), k.double(), v.double()), dtype)


def test_single_head_attention_is_for_heads_that_the_library_has_no_fast_kernels_for():
    from t2v_core.kernels import triton_wide_attention as fast

    assert not fast.pays(torch.empty(1, 8, 256, dtype=torch.float16))
    assert not fast.pays(torch.empty(1, 8, 512))
    assert not fast.pays(torch.empty(1, 16385, 512, dtype=torch.float16))


@needs_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("rows", "width", "inner"), [(100, 72, 104), (129, 320, 64), (7, 64, 136), (700, 576, 264)])
def test_geglu(rows, width, inner, dtype, monkeypatch):
    from t2v_core.kernels import triton_geglu as fast

    monkeypatch.setattr(fast, "num_processors", lambda device: 5)  # each has several tiles
    x, proj = draw(rows, width, dtype=dtype), randomised(nn.Linear(width, 2 * inner), dtype)
    assert fast.fits(x, proj)
    actual = fast.geglu(x, proj)
    beside = torch.zeros(rows, inner + 8, dtype=dtype, device=DEVICE)
    fast.geglu(x, proj, out=beside[:, 8:])
    assert_close(actual, plain.geglu(x.double(), proj.double()), dtype)
    assert torch.equal(beside[:, 8:], actual)
    assert not beside[:, :8].any()


@needs_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("num_frames", "side", "channels", "out_channels"), [(1, 3, 64, 8), (5, 4, 128, 72), (3, 12, 64, 136)]
)
def test_conv_over_time(num_frames, side, channels, out_channels, dtype):
    from t2v_core.kernels import triton_conv as fast

    x = draw(2, num_frames, side, side, channels, dtype=dtype)
    weight = draw(out_channels, channels, 3, 1, 1, dtype=dtype).to(memory_format=torch.channels_last_3d)
    assert fast.fits(x, weight)
    assert_close(fast.conv_over_time(x, weight), plain.conv_over_time(x.double(), weight.double()), dtype)


def test_conv_over_time_is_for_some_sizes_and_for_weights_with_channels_last():
    from t2v_core.kernels import triton_conv as fast

    x, weight = draw(1, 16, 16, 16, 640, dtype=torch.float16), draw(640, 640, 3, 1, 1, dtype=torch.float16)
    last = weight.to(memory_format=torch.channels_last_3d)
    assert not fast.pays(x, weight)
    assert fast.pays(x, last)
    assert not fast.pays(x.expand(8, -1, -1, -1, -1), last)
    assert not fast.pays(x[:, :1], last)
    assert not fast.fits(x.float(), last.float())


def test_geglu_is_not_for_rows_that_the_copy_engine_cannot_take():
    from t2v_core.kernels import triton_geglu as fast

    assert not fast.fits(draw(4, 68, dtype=torch.float16), nn.Linear(68, 128))
    assert not fast.fits(draw(4, 64, dtype=torch.float16), nn.Linear(64, 2 * 100))


@pytest.mark.parametrize(("shape", "groups"), [((2, 3, 4, 5, 160), 4), ((1, 3, 11, 12, 320), 32)])
def test_norms_write_fp8(shape, groups):
    from t2v_core.kernels import triton_group_norm, triton_rows

    x, delta = draw(*shape, dtype=torch.float16), draw(*shape, dtype=torch.float16)
    offset, group_norm = draw(shape[-1], dtype=torch.float16), randomised(nn.GroupNorm(groups, shape[-1]), torch.half)
    how = {"over_frames": True, "silu": True}
    summed, normed = triton_group_norm.add_group_norm(x, delta, offset, group_norm, **how, dtype=FP8)
    exact = plain.add_group_norm(x.double(), delta.double(), offset.double(), group_norm.double(), **how)
    assert_close(summed, exact[0], torch.float16)
    assert_close(normed, exact[1], FP8)
    layer_norm = randomised(nn.LayerNorm(shape[-1]), torch.half)
    beside = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=FP8, device=DEVICE)
    _, normed = triton_rows.add_layer_norm(x, delta, offset, layer_norm, beside[..., : shape[-1]], FP8)
    exact = plain.add_layer_norm(x.double(), delta.double(), offset.double(), layer_norm.double())
    assert_close(beside[..., : shape[-1]], exact[0], FP8)
    assert_close(normed, exact[1], FP8)


@needs_hopper
@pytest.mark.parametrize(
    ("num_frames", "height", "width", "channels", "out_channels"),
    [(1, 3, 3, 64, 8), (5, 4, 4, 128, 72), (3, 12, 20, 64, 136), (2, 9, 33, 320, 64)],
)
def test_convolutions_in_fp8(num_frames, height, width, channels, out_channels):
    from t2v_core.kernels import triton_conv as fast

    x = to_fp8(draw(2, num_frames, height, width, channels, dtype=torch.float16))
    for kernel, conv, last in (
        ((3, 3), "conv_frames", torch.channels_last),
        ((3, 1, 1), "conv_over_time", torch.channels_last_3d),
    ):
        weight = draw(out_channels, channels, *kernel, dtype=torch.float16) * channels**-0.5
        (weight,) = quantised(weight.to(memory_format=last))
        assert fast.fits(x, weight)
        exact = getattr(plain, conv)(x, weight, torch.float64)
        assert_close(getattr(fast, conv)(x, weight, torch.float16), exact, torch.float16, FP8_SUM_TOLERANCE)


@needs_hopper
@pytest.mark.parametrize(("rows", "width", "inner"), [(100, 80, 112), (129, 320, 64), (300, 640, 144)])
def test_geglu_in_fp8(rows, width, inner, monkeypatch):
    from t2v_core.kernels import triton_geglu as fast

    monkeypatch.setattr(fast, "num_processors", lambda device: 2)
    x, proj = to_fp8(draw(rows, width, dtype=torch.float16)), randomised(nn.Linear(width, 2 * inner), torch.half)
    (weight,) = quantised(proj.weight / 2)
    proj.weight = nn.Parameter(weight, requires_grad=False)
    assert fast.fits(x, proj)
    exact_proj = nn.Linear(width, 2 * inner, dtype=torch.float64, device=DEVICE)
    exact_proj.weight = nn.Parameter(proj.weight.double() / WEIGHT_SCALE)
    exact_proj.bias = nn.Parameter(proj.bias.double())
    exact = plain.geglu(x.double(), exact_proj)
    assert_close(fast.geglu(x, proj), exact, torch.float16, FP8_SUM_TOLERANCE)
    beside = torch.zeros(rows, inner + 16, dtype=FP8, device=DEVICE)
    fast.geglu(x, proj, out=beside[:, 16:])
    assert_close(beside[:, 16:], exact, FP8)
    assert not beside[:, :16].float().any()


@pytest.mark.parametrize("has_noise", [False, True])
def test_a_samplers_update(has_noise):
    from t2v_core.kernels import triton_sampler as fast

    latents, eps, noise = (draw(3, 4, 5, 6, 7, dtype=torch.float32) for _ in range(3))
    history, rows = draw(3, 2, 4, 5, 6, 7, dtype=torch.float32), draw(3, 7, dtype=torch.float32, mean=3.0)
    noise = noise if has_noise else None
    actual = fast.sampler_update(latents, eps, history, noise, rows)
    exact = plain.sampler_update(
        latents.double(), eps.double(), history.double(), None if noise is None else noise.double(), rows.double()
    )
    for ours, expected in zip(actual, exact, strict=True):
        assert_close(ours, expected, torch.float32)


@pytest.mark.parametrize(("sizes", "length"), [((16, 32, 32), 128), ((5, 40, 72), 128), ((7, 3, 3), 128)])
def test_boxes_of_pixels_waste_little(sizes, length):
    from t2v_core.kernels import triton_conv as fast

    box = fast._box(*sizes)
    assert box[0] * box[1] * box[2] == length
    covered = [-(-size // part) * part for size, part in zip(sizes, box, strict=True)]
    assert covered[0] * covered[1] * covered[2] <= max(length, 1.5 * sizes[0] * sizes[1] * sizes[2])
