"""A kernel is used when its first result is right, and left when it is not."""

import logging
import math
from pkgutil import resolve_name

import pytest
import torch
from torch import nn

from t2v_core.kernels import first_results, ops, plain
from t2v_core.kernels.first_results import FirstResults, ends_of_frames, ends_of_pixels, ends_of_rows

pytestmark = pytest.mark.usefixtures("seeded")


class Kernel:
    """Gives what it is told, and counts."""

    def __init__(self, result):
        self.result, self.calls, self.looks = result, 0, 0

    def __call__(self):
        self.calls += 1
        return self.result

    def pairs(self, exact):
        def look(result):
            self.looks += 1
            return [(result, exact)]

        return look


@pytest.fixture
def results():
    return FirstResults()


def test_one_that_is_right_is_looked_at_once(results):
    exact = torch.randn(4, 8)
    kernel = Kernel((exact * 1.001).half())
    for _ in range(3):
        assert results.call("a", kernel, kernel.pairs(exact)) is kernel.result
    assert (kernel.calls, kernel.looks) == (3, 1)
    results.call("b", kernel, kernel.pairs(exact))
    assert kernel.looks == 2


@pytest.mark.parametrize("wrong", [1.2, 0.0, math.nan, math.inf])
def test_one_that_is_wrong_is_told_and_not_called_again(results, wrong, caplog):
    exact = torch.randn(4, 8)
    kernel = Kernel(exact * wrong)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert results.call(("conv", 32), kernel, kernel.pairs(exact)) is None
    assert (kernel.calls, kernel.looks) == (1, 1)
    assert "('conv', 32) is wrong by" in caplog.text
    assert len(caplog.records) == 1


def test_inputs_that_are_no_numbers_say_nothing_of_a_kernel(results, caplog):
    nothing = torch.full((4,), math.nan)
    kernel = Kernel(nothing)
    assert results.call("a", kernel, kernel.pairs(nothing)) is nothing
    assert not caplog.records
    exact = torch.randn(4)
    kernel.result = -exact
    assert results.call("a", kernel, kernel.pairs(exact)) is None


def test_nothing_is_looked_at_while_a_graph_is_captured(results, monkeypatch):
    monkeypatch.setattr(first_results, "_is_captured", lambda: True)
    kernel = Kernel(torch.ones(4))
    assert results.call("a", kernel, kernel.pairs(torch.zeros(4))) is kernel.result
    assert not kernel.looks
    monkeypatch.setattr(first_results, "_is_captured", lambda: False)
    assert results.call("a", kernel, kernel.pairs(torch.zeros(4))) is None


def test_the_ends_are_of_the_first_and_the_last_program():
    x = torch.arange(2 * 3 * 20 * 30 * 2).view(2, 3, 20, 30, 2)
    assert torch.equal(ends_of_rows(x), torch.cat([x.flatten(0, 3)[:128], x.flatten(0, 3)[-128:]]))
    assert torch.equal(ends_of_frames(x), torch.stack([x[0, 0], x[1, 2]])[None])
    assert ends_of_pixels(x).shape == (2, 3, 128, 1, 2)
    assert torch.equal(ends_of_pixels(x)[0, :, 31, 0], x[0, :, 1, 1])
    assert torch.equal(ends_of_pixels(x)[1, :, -1, 0], x[1, :, 19, 29])


@pytest.fixture
def runs_gluon(monkeypatch):
    """As on a Hopper GPU, in the interpreter where there is none, and with nothing known yet."""
    pytest.importorskip("triton", reason="torch brings Triton on Linux alone")
    import gluon_interpreter

    if torch.cuda.is_available():
        pytest.skip("test_gluon_kernels.py calls them on a GPU")
    monkeypatch.setattr(gluon_interpreter.GluonJITFunction, "run", gluon_interpreter.launch)
    monkeypatch.setattr(ops, "_runs_gluon", lambda x: x.dtype == torch.float16)
    monkeypatch.setattr(ops, "_first_results", FirstResults())


def halves(*size):
    return torch.randn(size).half()


def conv_frames():
    x, weight = halves(1, 3, 16, 16, 64), halves(320, 64, 3, 3).to(memory_format=torch.channels_last) / 24
    return "gluon_conv._conv", ops.conv_frames(x, weight, x.dtype), plain.conv_frames(x, weight, x.dtype)


def conv_over_time():
    x, weight = halves(1, 16, 3, 8, 64), halves(320, 64, 3, 1, 1).to(memory_format=torch.channels_last_3d) / 14
    return "gluon_conv._conv", ops.conv_over_time(x, weight), plain.conv_over_time(x, weight)


def geglu():
    x, proj = halves(1, 1, 16, 16, 320), nn.Linear(320, 2560).half()
    return "gluon_geglu.geglu", ops.geglu(x, proj), plain.geglu(x, proj)


def spatial_attention():
    qkv = halves(1, 1, 16, 24, 192)
    return "gluon_attention.spatial_attention", ops.spatial_attention(qkv, 1), plain.spatial_attention(qkv, 1)


def linear_norm():
    x, weight, offset, residual = (
        halves(1, 1, 16, 16, 320),
        halves(320, 320) / 18,
        halves(320),
        halves(1, 1, 16, 16, 320),
    )
    norm, then = nn.LayerNorm(320).half(), halves(320, 320) / 18
    _, actual = ops.linear_norm(x, weight, offset, norm, residual=residual, then=then)
    _, exact = ops._linear_norm(x, weight, offset, norm, residual, then, None, None)
    return "gluon_linear_norm.linear_norm", actual, exact


@pytest.mark.usefixtures("runs_gluon")
@pytest.mark.parametrize("called", [conv_frames, conv_over_time, geglu, spatial_attention, linear_norm])
def test_every_kernel_is_held_against_its_equivalent(called, monkeypatch, caplog):
    for module in ("gluon_conv", "gluon_geglu", "gluon_linear_norm"):
        monkeypatch.setattr(f"t2v_core.kernels.{module}.num_processors", lambda device: 1)
    monkeypatch.setattr("t2v_core.kernels.gluon_attention._MIN_TOKENS", 1)
    function, actual, exact = called()
    assert not caplog.records
    assert list(ops._first_results._is_right.values()) == [True]
    assert not torch.equal(actual, exact)  # so it is the kernel's
    ops._first_results._is_right.clear()
    right = resolve_name(f"t2v_core.kernels.{function}")

    def wrong(*args, **kwargs):
        results = right(*args, **kwargs)
        return tuple(-result for result in results) if isinstance(results, tuple) else -results

    monkeypatch.setattr(f"t2v_core.kernels.{function}", wrong)
    _, actual, exact = called()
    assert torch.equal(actual, exact)
    assert "is wrong by 2" in caplog.text
