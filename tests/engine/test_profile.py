"""How the row budget comes from what was measured."""

import subprocess
import sys

import pytest
import torch

from t2v_core.engine import Profile, RowBudgets, free_memory_bytes, measure, warm_up
from t2v_core.engine.batching import Demand, Group
from t2v_core.engine.profile import Measurement
from t2v_core.errors import InvalidProfile, OutOfMemory
from t2v_core.pipeline import load
from t2v_core.shapes import LatentShape

SHAPE = LatentShape(4, 16, 32, 32)
# What diffusers' UNet took on an H200, and about its memory beside the weights.
SECONDS = {1: 0.065, 2: 0.083, 4: 0.104, 8: 0.182, 16: 0.332, 32: 0.647}
PROFILE = Profile(
    device="NVIDIA H200",
    dtype="torch.float16",
    measurements=tuple(
        Measurement(shape=SHAPE, rows=rows, step_s=step_s, memory_bytes=rows * 320_000_000)
        for rows, step_s in SECONDS.items()
    ),
)


def test_the_fewest_rows_for_a_share_of_the_best_throughput():
    # 8 rows give 44.0 a second, 16 give 48.2, 32 give 49.5.
    assert [PROFILE.rows_for(SHAPE, share) for share in (0.0, 0.88, 0.9, 0.97, 0.98, 1.0)] == [1, 8, 16, 16, 32, 32]


def test_a_shape_that_was_not_measured_goes_by_its_volume():
    assert PROFILE.rows_for(LatentShape(4, 16, 32, 64), 0.9) == 8
    assert PROFILE.rows_for(LatentShape(4, 8, 32, 32), 0.9) == 32
    assert PROFILE.rows_for(LatentShape(4, 160, 320, 320), 0.9) == 1
    assert PROFILE.step_s(LatentShape(4, 16, 32, 64), 8) == pytest.approx(SECONDS[16])


def test_a_step_time_lies_between_the_measured_ones():
    assert PROFILE.step_s(SHAPE, 8) == SECONDS[8]
    assert PROFILE.step_s(SHAPE, 12) == pytest.approx((SECONDS[8] + SECONDS[16]) / 2)
    assert PROFILE.step_s(SHAPE, 64) == pytest.approx(2 * SECONDS[32])
    assert PROFILE.step_s(LatentShape(4, 1, 8, 8), 1) == SECONDS[1]


def test_the_more_wait_the_more_throughput_is_asked_for():
    rates = {2: 90.0, 4: 94.0, 8: 97.0, 16: 100.0}  # rows a second
    measurements = (Measurement(shape=SHAPE, rows=n, step_s=n / rate, memory_bytes=n) for n, rate in rates.items())
    budgets = RowBudgets(Profile(device="", dtype="", measurements=tuple(measurements)))
    waiting = (0, 1, 11, 12, 20, 63, 64, 200)
    assert [budgets.rows(Group(SHAPE, 77), Demand(rows)) for rows in waiting] == [2, 4, 4, 8, 8, 8, 16, 16]


def test_riders_must_not_slow_an_urgent_request_much():
    group, budgets = Group(SHAPE, 77), RowBudgets(PROFILE)
    rows = budgets.rows(group, Demand(200, urgent_rows=2))
    assert PROFILE.step_s(SHAPE, rows) <= 1.7 * PROFILE.step_s(SHAPE, 2) < PROFILE.step_s(SHAPE, rows + 1)
    assert budgets.rows(group, Demand(200, urgent_rows=200)) == 32


def test_without_a_profile_urgent_requests_are_alone():
    group, budgets = Group(SHAPE, 77), RowBudgets(unmeasured_rows=8)
    assert budgets.rows(group, Demand(20)) == 8
    assert budgets.rows(group, Demand(20, urgent_rows=2)) == 2
    assert budgets.rows(group, Demand(20, urgent_rows=12)) == 8


def test_memory_bounds_the_rows():
    group = Group(SHAPE, 77)
    assert RowBudgets(PROFILE, free_bytes=10**12).rows(group, Demand(2)) == 16
    assert RowBudgets(PROFILE, free_bytes=2_000_000_000).rows(group, Demand(2)) == 6
    assert RowBudgets(PROFILE, free_bytes=1).rows(group, Demand(2)) == 1


def test_a_budget_that_was_halved_grows_back_after_many_steps():
    group, budgets = Group(SHAPE, 77), RowBudgets(PROFILE)
    budgets.halve(SHAPE, 16)
    budgets.halve(SHAPE, 8)
    assert budgets.rows(group, Demand(2)) == 4
    seen = []
    for _ in range(1000):
        budgets.succeeded(SHAPE)
        seen.append(budgets.rows(group, Demand(2)))
    assert seen[100] == 4
    assert sorted(set(seen)) == [4, 8, 16]


def test_a_budget_grows_back_by_one_doubling_at_a_time_however_many_wait():
    group, budgets = Group(SHAPE, 77), RowBudgets(PROFILE)
    budgets.halve(SHAPE, 16)
    seen = []
    for _ in range(1000):
        budgets.succeeded(SHAPE)
        seen.append(budgets.rows(group, Demand(200)))
    assert sorted(set(seen)) == [8, 16, RowBudgets(PROFILE).rows(group, Demand(200))]


def test_memory_that_runs_out_again_starts_the_wait_anew():
    group, budgets = Group(SHAPE, 77), RowBudgets(PROFILE)
    budgets.halve(SHAPE, 16)
    for _ in range(150):
        budgets.succeeded(SHAPE)
    budgets.halve(SHAPE, 8)
    for _ in range(150):
        budgets.succeeded(SHAPE)
    assert budgets.rows(group, Demand(2)) == 4


def test_a_profile_is_saved_and_read_again(tmp_path):
    PROFILE.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == PROFILE


@pytest.mark.parametrize("text", ["", "{}", '{"device": "x", "dtype": "y", "measurements": [], "more": 1}', "\x00"])
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, text):
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(InvalidProfile, match=r"profile\.json.*measure it again"):
        Profile.load(tmp_path / "profile.json")
    with pytest.raises(InvalidProfile, match="missing"):
        Profile.load(tmp_path / "missing")


def test_measuring_the_real_network_stops_where_memory_ends(tiny_pipeline):
    shape = LatentShape(4, 2, 4, 4)

    def check(_, arguments):
        if len(arguments[3]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    handle = tiny_pipeline.unet.register_forward_pre_hook(check)
    try:
        profile = measure(tiny_pipeline.unet, [shape], rows=(1, 4, 8))
    finally:
        handle.remove()
    assert {m.rows for m in profile.measurements} <= {1, 4}
    assert (profile.device, profile.dtype) == ("cpu", "torch.float32")
    assert profile.rows_for(shape, 0.9) in (1, 4)
    assert RowBudgets(profile).step_s(shape, 1) > 0


def test_a_profile_is_of_one_device_and_precision(tiny_checkpoint):
    exact, fp8 = (load(tiny_checkpoint, device="cpu", precision=precision).unet for precision in ("exact", "fp8"))
    profile = measure(exact, [LatentShape(4, 2, 4, 4)], rows=(1,), repeats=0)
    assert profile.is_of(exact)
    assert not profile.is_of(fp8)
    assert not profile.model_copy(update={"device": "NVIDIA H100"}).is_of(exact)


def test_warming_up_calls_the_network_with_the_rows_that_steps_will_have(tiny_pipeline):
    shape, calls = LatentShape(4, 2, 4, 4), []
    measurements = tuple(
        Measurement(shape=shape, rows=rows, step_s=step_s, memory_bytes=0)
        for rows, step_s in ((1, 1.0), (2, 1.5), (4, 2.0), (6, 9.0))
    )
    handle = tiny_pipeline.unet.register_forward_pre_hook(
        lambda _, arguments: calls.append((len(arguments[0]), len(arguments[3])))
    )
    try:
        warm_up(tiny_pipeline.unet, [shape], Profile(device="cpu", dtype="", measurements=measurements))
    finally:
        handle.remove()
    assert calls == [(1, 1), (1, 2), (2, 4)]  # videos, and rows of both their texts


def test_a_shape_of_which_no_row_fits_is_an_error(tiny_pipeline):
    def check(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    handle = tiny_pipeline.unet.register_forward_pre_hook(check)
    try:
        with pytest.raises(OutOfMemory, match="smaller size"):
            measure(tiny_pipeline.unet, [LatentShape(4, 2, 4, 4)])
    finally:
        handle.remove()


PEAKS = """
import torch
from t2v_core.engine.memory import peak_bytes

def call():
    for _ in range(3):  # freed each time
        torch.ones(64 << 18)  # 64 MiB
    return torch.ones(16 << 18)

torch.ones(256 << 18)  # what was freed before does not count
print(*(peak_bytes(call, torch.device("cpu")) for _ in range(2)))
"""


def test_the_memory_of_a_call_is_the_most_that_it_takes_at_once():
    """In a process of its own: what other tests have left at work would count."""
    told = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    for taken in map(int, told.split()):
        assert 0.9 * (64 << 20) < taken < 1.5 * (64 << 20)


def test_the_memory_of_the_real_network_is_measured_on_a_cpu(tiny_pipeline):
    small, large = LatentShape(4, 4, 32, 32), LatentShape(4, 16, 64, 64)
    profile = measure(tiny_pipeline.unet, [small, large], rows=(2,), repeats=1)
    first, second = profile.measurements
    assert second.memory_bytes > 2 * first.memory_bytes
    assert profile.bytes_per_latent == second.memory_bytes / (2 * 16 * 64 * 64)


def test_what_graphs_and_other_gpus_hold_is_not_free(monkeypatch):
    """There is no GPU here: torch.cuda's own answers are replaced, and nothing of ours."""
    segments = [
        {"device": 0, "segment_pool_id": (0, 0), "total_size": 10 << 30, "allocated_size": 4 << 30},
        {"device": 0, "segment_pool_id": (0, 1), "total_size": 8 << 30, "allocated_size": 1 << 30},
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 8 << 30, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert free_memory_bytes(torch.device("cuda")) == int(0.9 * (10 << 30))
    assert free_memory_bytes(torch.device("cpu")) is None
