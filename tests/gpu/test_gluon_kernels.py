"""Each kernel in Gluon gives what its plain PyTorch equivalent gives in float64, on random shapes and values.

On a Hopper GPU, or in an interpreter of our own (gluon_interpreter.py) where there is no GPU.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE, HALVES, TOLERANCES, assert_close, draw, randomised
from torch import nn

from t2v_core import kernels
from t2v_core.kernels import ops, plain

pytest.importorskip("triton", reason="torch brings Triton on Linux alone")

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def runs_gluon(monkeypatch):
    """Whatever this machine has."""
    if DEVICE == "cpu":
        import gluon_interpreter

        monkeypatch.setattr(gluon_interpreter.GluonJITFunction, "run", gluon_interpreter.launch)
    elif torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU, or none")


def matrix(rows, dtype):
    """Of a product that keeps the size of 320 channels."""
    return draw(rows, 320, dtype=dtype) / 320**0.5


@pytest.mark.usefixtures("runs_gluon")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("processors", [1, 5, 132])
@pytest.mark.parametrize(
    ("rows", "width", "inner"), [(100, 64, 256), (129, 320, 512), (2000, 320, 1280), (1500, 512, 1024)]
)
def test_geglu(rows, width, inner, processors, dtype, monkeypatch):
    from t2v_core.kernels import gluon_geglu as fast

    monkeypatch.setattr(fast, "num_processors", lambda device: processors)
    x, proj = draw(rows, width, dtype=dtype), randomised(nn.Linear(width, 2 * inner), dtype)
    assert fast.fits(x, proj)
    actual = fast.geglu(x, proj)
    beside = torch.zeros(rows, inner + 8, dtype=dtype, device=DEVICE)
    fast.geglu(x, proj, out=beside[:, 8:])
    assert_close(actual, plain.geglu(x.double(), proj.double()), dtype)
    assert torch.equal(beside[:, 8:], actual)
    assert not beside[:, :8].any()


def test_geglu_is_for_narrow_layers_with_rows_for_most_processors():
    from t2v_core.kernels import gluon_geglu as fast

    x, proj = torch.empty(8192, 320, dtype=torch.float16), nn.Linear(320, 2560, dtype=torch.float16)
    assert fast.pays(x, proj)
    assert not fast.pays(x[:4096], proj)
    assert not fast.fits(x.float(), proj.float())
    for width in (300, 640):  # not by whole boxes, and too wide
        assert not fast.fits(torch.empty(8192, width, dtype=torch.float16), nn.Linear(width, 8 * width).half())


@pytest.mark.usefixtures("runs_gluon")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("heads", "frames", "height", "width"),
    [(1, 3, 3, 5), (2, 3, 8, 16), (2, 3, 20, 36), (5, 2, 32, 32), (1, 2, 40, 72), (1, 1, 72, 128)],
)
def test_spatial_attention(heads, frames, height, width, dtype):
    from t2v_core.kernels import gluon_attention as fast

    qkv = draw(2, frames, height, width, 3 * heads * 64, dtype=dtype)
    qkv[..., : heads * 64] *= 3  # so that some weights are large
    assert fast.fits(qkv, heads)
    actual, exact = fast.spatial_attention(qkv, heads), plain.spatial_attention(qkv.double(), heads)
    assert_close(actual, exact, dtype, 1.5 * TOLERANCES[dtype])


@pytest.mark.usefixtures("runs_gluon")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(16, 24), (20, 36)])
def test_spatial_attention_where_the_first_keys_do_not_tell_what_to_subtract(height, width, dtype):
    """Powers of two of what is larger by more than 24 overflow: such queries are done again."""
    from t2v_core.kernels import gluon_attention as fast

    qkv = draw(1, 2, height, width, 3 * 64, dtype=dtype)
    qkv[:, 1, : height // 2, :, 64:128] *= 12
    q, k, _ = qkv[0, 1].double().flatten(0, 1).chunk(3, dim=-1)
    scores = q @ k.T / 8 / math.log(2)
    assert (scores.amax(1) - scores[:, -128:].amax(1)).max() > 30
    actual, exact = fast.spatial_attention(qkv, 1), plain.spatial_attention(qkv.double(), 1)
    assert_close(actual, exact, dtype, 1.5 * TOLERANCES[dtype])


@pytest.mark.usefixtures("runs_gluon")
def test_spatial_attention_where_only_the_weights_sum_overflows():
    """Those of two keys, in bfloat16, are not infinite, nor is what they make of small values."""
    from t2v_core.kernels import gluon_attention as fast

    qkv = torch.zeros(1, 1, 16, 24, 3 * 64, dtype=torch.bfloat16, device=DEVICE)
    qkv[..., :64], qkv[..., 128:] = 1.0, 0.25
    qkv[0, 0, 0, :2, 64:128] = 11.75  # scores of 135.6, of which 8 are subtracted
    assert_close(fast.spatial_attention(qkv, 1), torch.full_like(qkv[..., :64], 0.25).double(), torch.bfloat16)


def test_spatial_attention_is_for_many_pixels_and_heads_of_64_channels():
    from t2v_core.kernels import gluon_attention as fast

    qkv = torch.empty(1, 1, 40, 72, 3 * 128, dtype=torch.float16)
    assert fast.pays(qkv, heads=2)
    assert not fast.pays(qkv[:, :, :7], heads=2)
    assert not fast.pays(qkv[:, :, :32, :32], heads=2)  # of six programs' queries, a ninth are none
    assert not fast.fits(qkv, heads=1)
    assert not fast.fits(qkv.float(), heads=2)


@pytest.mark.usefixtures("runs_gluon")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("processors", [1, 5, 132])
@pytest.mark.parametrize("then_width", [None, 320, 960])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("rows", [1, 200, 1500])
def test_linear_norm(rows, has_residual, then_width, processors, dtype, monkeypatch):
    from t2v_core.kernels import gluon_linear_norm as fast

    monkeypatch.setattr(fast, "num_processors", lambda device: processors)
    x, weight, norm = draw(rows, 320, dtype=dtype), matrix(320, dtype), randomised(nn.LayerNorm(320), dtype)
    offset, residual = draw(320, dtype=dtype), draw(rows, 320, dtype=dtype) if has_residual else None
    then = None if then_width is None else matrix(then_width, dtype)
    assert fast.fits(x, weight, then)
    actual = fast.linear_norm(x, weight, offset, norm, residual=residual, then=then)
    beside = torch.zeros(rows, 328, dtype=dtype, device=DEVICE)
    fast.linear_norm(x, weight, offset, norm, residual=residual, then=then, out=beside[:, 8:])
    x, weight, offset, residual, then = (t if t is None else t.double() for t in (x, weight, offset, residual, then))
    exact = ops.linear_norm(x, weight, offset, norm.double(), residual=residual, then=then)
    for ours, expected in zip(actual, exact, strict=True):
        assert_close(ours, expected, dtype)
    assert torch.equal(beside[:, 8:], actual[0])
    assert not beside[:, :8].any()


def test_linear_norm_is_for_320_channels_and_rows_for_most_processors():
    from t2v_core.kernels import gluon_linear_norm as fast

    x, weight, then = torch.empty(16384, 320).half(), torch.empty(320, 320).half(), torch.empty(960, 320).half()
    assert fast.pays(x, weight, then)
    assert fast.pays(x, weight, None)
    assert not fast.pays(x[:8192], weight, then)
    assert not fast.fits(x, weight, then[:900])
    assert not fast.fits(x, torch.empty(512, 320).half(), then)
    assert not fast.fits(x, weight, then.float())


@pytest.mark.usefixtures("runs_gluon")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("processors", [1, 5, 132])
@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("pieces", [(64,), (32,), (64, 32)], ids=str)
@pytest.mark.parametrize(
    ("rows", "frames", "height", "width", "channels", "parts"),
    [(1, 1, 1, 1, 64, 1), (3, 9, 3, 7, 128, 2), (2, 16, 8, 9, 64, 3), (2, 24, 2, 9, 640, 1)],
)
def test_conv_over_time(
    rows, frames, height, width, channels, parts, pieces, runs_ahead, processors, dtype, monkeypatch
):
    from t2v_core.kernels import gluon_conv as fast

    monkeypatch.setattr(fast, "num_processors", lambda device: processors)
    monkeypatch.setattr(fast, "_RUNS_AHEAD", runs_ahead)
    x, weight = draw(rows, frames, height, width, channels, dtype=dtype), taps(parts * 5 * max(pieces), channels, dtype)
    assert fast.fits(x, weight)
    actual = fast.conv_over_time(x, weight, pieces)
    assert_close(actual, plain.conv_over_time(x.double(), weight.double()), dtype)


@pytest.mark.usefixtures("runs_gluon")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("pieces", [(64,), (32,), (64, 32)], ids=str)
@pytest.mark.parametrize(
    ("frames", "height", "width", "channels", "parts"),
    [(1, 1, 1, 64, 1), (3, 9, 7, 128, 2), (4, 8, 16, 64, 3), (3, 20, 36, 128, 1)],
)
def test_conv_frames(frames, height, width, channels, parts, pieces, processors, dtype, monkeypatch):
    from t2v_core.kernels import gluon_conv as fast

    monkeypatch.setattr(fast, "num_processors", lambda device: processors)
    out_channels = parts * 5 * max(pieces)
    x, weight = draw(2, frames, height, width, channels, dtype=dtype), square_taps(out_channels, channels, dtype)
    assert fast.fits(x, weight)
    actual = fast.conv_frames(x, weight, pieces)
    assert_close(actual, plain.conv_frames(x.double(), weight.double(), torch.float64), dtype)


def taps(out_channels, channels, dtype):
    """Of a convolution over time that keeps the size of its channels, as networks have them in memory."""
    weight = draw(out_channels, channels, 3, 1, 1, dtype=dtype) / (3 * channels) ** 0.5
    return weight.to(memory_format=torch.channels_last_3d)


def square_taps(out_channels, channels, dtype):
    """The same of frames."""
    weight = draw(out_channels, channels, 3, 3, dtype=dtype) / (9 * channels) ** 0.5
    return weight.to(memory_format=torch.channels_last)


def test_convolutions_are_for_certain_channels_and_tiles_for_most_processors(monkeypatch):
    from t2v_core.kernels import gluon_conv as fast

    monkeypatch.setattr(fast, "num_processors", lambda device: 132)
    x, weight = torch.empty(2, 16, 32, 32, 320).half(), taps(320, 320, torch.float16)
    assert fast.pays(x, weight)
    assert not fast.pays(x[:, :, :8, :8], weight)
    assert not fast.pays(torch.empty(2, 24, 10, 18, 1280).half(), taps(1280, 1280, torch.float16))
    assert not fast.fits(x, weight.contiguous())
    assert not fast.fits(x, taps(320, 320, torch.float32))
    assert not fast.fits(x, taps(192, 320, torch.float16))
    assert not fast.fits(x[..., :100], taps(320, 100, torch.float16))
    of_frames = square_taps(320, 320, torch.float16)
    assert fast.pays(x, of_frames)
    assert not fast.pays(x[:, :, :30, :28], of_frames)  # too much outside
    assert not fast.fits(x, of_frames[:, :, :1])


@pytest.mark.parametrize(
    ("frames", "height", "width", "channels", "tiles"),
    [
        (16, 32, 32, 320, [(64, 0, 256)]),
        (16, 16, 16, 640, [(64, 0, 128)]),
        (16, 8, 8, 1280, [(32, 0, 128)]),
        (24, 10, 18, 1280, [(64, 0, 264), (32, 528, 24)]),  # two rounds of 132, and 12 of the third
        (24, 20, 36, 640, [(64, 0, 528), (32, 1056, 24)]),
        (24, 40, 72, 320, [(64, 0, 1080)]),  # half of one of nine short rounds is not worth a launch
        (24, 36, 64, 640, [(64, 0, 1716), (32, 3432, 24)]),
        (24, 18, 32, 1280, [(64, 0, 864)]),  # 72 of the seventh round are more than one of small ones
    ],
)
def test_convolutions_have_small_tiles_where_large_ones_leave_processors_idle(
    frames, height, width, channels, tiles, monkeypatch
):
    from t2v_core.kernels import gluon_conv as fast

    monkeypatch.setattr(fast, "num_processors", lambda device: 132)
    x = torch.empty(2, frames, height, width, channels, device="meta")
    weight = torch.empty(channels, channels, 3, 1, 1, device="meta")
    pairs = fast._pairs(fast._images(x, weight))
    launches = fast._launches(pairs, channels, fast.pieces_for(x, weight), 132)
    assert [(launch.piece, launch.first, launch.tiles) for launch in launches] == tiles


@pytest.mark.parametrize("processors", [1, 5, 114, 132])
@pytest.mark.parametrize("pairs", [1, 2, 33, 67])
def test_each_tile_of_a_convolution_is_of_one_launch(pairs, processors):
    from t2v_core.kernels import gluon_conv as fast

    for pieces in fast._LAUNCHES:
        launches = fast._launches(pairs, 960, pieces, processors)
        of_pairs = [(launch.first / launch.parts, launch.tiles / launch.parts) for launch in launches]
        assert [first for first, _ in of_pairs] == [0, *(first + tiles for first, tiles in of_pairs[:-1])]
        assert sum(tiles for _, tiles in of_pairs) == pairs
        assert all(launch.tiles > 0 and launch.parts * 5 * launch.piece == 960 for launch in launches)


def test_kernels_in_triton_do_without_gluon():
    """Which may be another with the next Triton, or none."""
    names = [path.stem for path in Path(kernels.__file__).parent.glob("triton_*.py")]
    assert len(names) > 10
    imports = "; ".join(f"import t2v_core.kernels.{name}" for name in names)
    command = f"import sys; sys.modules['triton.experimental.gluon'] = None; {imports}"
    subprocess.run([sys.executable, "-c", command], check=True)


def test_another_gluon_is_told_and_not_used(monkeypatch, caplog):
    from triton.experimental.gluon.language.nvidia import hopper

    ops._knows_gluon.cache_clear()
    assert ops._knows_gluon()
    ops._knows_gluon.cache_clear()
    for module in ("gluon_hopper", "gluon_geglu", "gluon_attention", "gluon_linear_norm", "gluon_conv"):
        monkeypatch.delitem(sys.modules, f"t2v_core.kernels.{module}", raising=False)
    monkeypatch.delattr(hopper, "warpgroup_mma")
    assert not ops._knows_gluon()
    assert "another Gluon" in caplog.text
    ops._knows_gluon.cache_clear()
