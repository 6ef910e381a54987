"""Gluon's interpreter finds what is wrong: no kernel of ours passes without one of its waits, arrivals or fences."""

import importlib.util
import random
import re
from pathlib import Path

import pytest
import torch
from kernel_checks import TOLERANCES
from torch import nn

from t2v_core import kernels
from t2v_core.kernels import ops, plain

pytest.importorskip("triton", reason="torch brings Triton on Linux alone")
interpreter = pytest.importorskip("gluon_interpreter")

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels run on it"),
]
FOLDER = Path(kernels.__file__).parent
ORDERS = re.compile(
    r"(?P<indent> +)(mbarrier\.(wait|arrive|expect)\(|fence_async_shared\(|tma\.store_wait\(|.*= warpgroup_mma_wait\()"
)
MOST_SEEDS = 20  # of the turns that are taken: some faults show in few of them


def load(name, folder, *, less=None):
    """The module of kernels, less one line."""
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    if less is not None:
        lines[less] = ORDERS.match(lines[less])["indent"] + "pass"
    path = folder / f"{name}.py"
    path.write_text("\n".join(lines))
    spec = importlib.util.spec_from_file_location(f"less_{less}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def geglu_error(module):
    module.num_processors = lambda device: 1
    x, proj = torch.randn(129, 512), nn.Linear(512, 1024)
    exact = plain.geglu(x, proj)
    return error(module.geglu(x.half(), proj.half()), exact)


def attention_error(module):
    """Of frames whose first keys tell what to subtract, and do not."""
    qkv = torch.randn(1, 2, 20, 36, 3 * 64).half()
    qkv[:, 1, :10, :, 64:128] *= 12
    return error(module.spatial_attention(qkv, 1), plain.spatial_attention(qkv.float(), 1))


def linear_norm_error(module):
    """The largest, of the kinds that the networks call for."""
    module.num_processors = lambda device: 1
    x, residual, offset, norm = torch.randn(700, 320), torch.randn(700, 320), torch.randn(320), nn.LayerNorm(320)
    weight, then = torch.randn(320, 320) / 320**0.5, torch.randn(320, 320) / 320**0.5
    halves, errors = [tensor.half() for tensor in (x, weight, offset)], []
    for summed, after in ((residual, then), (residual, None), (None, then)):
        exact = ops.linear_norm(x, weight, offset, norm.float(), residual=summed, then=after)
        summed, after = (tensor if tensor is None else tensor.half() for tensor in (summed, after))
        actual = module.linear_norm(*halves, norm.half(), residual=summed, then=after)
        errors += map(error, actual, exact)
    return max(errors)


def conv_error(module):
    """The largest, of tiles of both sizes, and of frames."""
    module.num_processors, module._RUNS_AHEAD = lambda device: 1, True
    x, weight = torch.randn(1, 9, 3, 5, 256), torch.randn(640, 256, 3, 1, 1) / 768**0.5
    exact, halves = plain.conv_over_time(x, weight), (x.half(), weight.half().to(memory_format=torch.channels_last_3d))
    errors = [error(module.conv_over_time(*halves, pieces), exact) for pieces in ((64,), (32,), (64, 32))]
    x, weight = torch.randn(1, 3, 9, 5, 64), torch.randn(320, 64, 3, 3) / 576**0.5
    exact = plain.conv_frames(x, weight, torch.float32)
    halves = x.half(), weight.half().to(memory_format=torch.channels_last)
    return max(*errors, error(module.conv_frames(*halves, (64,)), exact))


def error(actual, exact):
    return ((actual - exact).norm() / exact.norm()).item()


CHECKS = {
    "gluon_geglu": geglu_error,
    "gluon_attention": attention_error,
    "gluon_linear_norm": linear_norm_error,
    "gluon_conv": conv_error,
}


def passes(module, check):
    """Whether it is right in all the orders that are tried."""
    for seed in range(MOST_SEEDS):
        random.seed(seed)
        try:
            if not check(module) <= TOLERANCES[torch.float16]:
                return False
        except interpreter.RaceError:
            return False
    return True


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(interpreter.GluonJITFunction, "run", interpreter.launch)


@pytest.mark.parametrize("name", CHECKS)
def test_no_line_that_orders_is_superfluous(name, tmp_path):
    assert passes(load(name, tmp_path), CHECKS[name])
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    those = [number for number, line in enumerate(lines) if ORDERS.match(line) and "for speed alone" not in line]
    assert len(those) > 10
    assert [lines[number] for number in those if passes(load(name, tmp_path, less=number), CHECKS[name])] == []


@pytest.mark.parametrize("what", ["mbarrier.wait", "mbarrier.expect"])
def test_what_is_fetched_too_early_is_found(what, tmp_path):
    lines = (FOLDER / "gluon_hopper.py").read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines) if what in line]
    faulty = load("gluon_hopper", tmp_path, less=number)
    for name, check in CHECKS.items():
        module = load(name, tmp_path)
        if hasattr(module, "fetch_once_free"):
            module.fetch_once_free = faulty.fetch_once_free
            assert not passes(module, check)
