"""What load_tests/bench_gpu.py measures in which order, on a CPU with tiny networks. Nothing here is about how fast."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_gpu
import pytest
import torch
from gpu_device import Device
from gpu_peers import Work, make_work
from gpu_results import Record, Results
from timing import turns
from torch import Tensor

pytest.importorskip("diffusers")

CASE = "decode256"
BEFORE = 1 + 3 + 1  # calls of a system before it is timed: the first, to warm up, and for its error and memory


class Broken(Exception):
    """What a system is told to fail with."""


class WatchedWork:
    """A case's own work, which notes each build and call, and fails before those that it is told."""

    def __init__(self, work: Work, notes: list[str], failing: Callable[[str], bool]) -> None:
        self._work, self._notes, self._failing = work, notes, failing
        self.latents = work.latents

    def build(self, system: str) -> Any:
        self._note(f"build {system}")
        return self._work.build(system)

    def bind(self, system: str, network: Any) -> Callable[[Tensor], Tensor]:
        call = self._work.bind(system, network)

        def watched(latents: Tensor) -> Tensor:
            self._note(system)
            return call(latents)

        return watched

    def reference(self) -> Tensor:
        return self._work.reference()

    def _note(self, note: str) -> None:
        if self._failing(note):
            raise Broken(note)
        self._notes.append(note)


class Program:
    """bench_gpu.py as it is called, with one results file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
        self._monkeypatch, self._file = monkeypatch, file
        self.notes: list[str] = []
        self.failing: Callable[[str], bool] = lambda note: False
        monkeypatch.setattr(bench_gpu, "make_work", self._watched)

    def __call__(self, *options: str, cases: tuple[str, ...] = (CASE,)) -> list[tuple[str, int]]:
        """What was built, and what called how often, in their order."""
        self.notes.clear()
        command = ["bench_gpu.py", str(self._file), "--device", "cpu", "--tiny", "--cases", *cases, *options]
        self._monkeypatch.setattr(sys, "argv", command)
        bench_gpu.main()
        return [(note, len(list(group))) for note, group in groupby(self.notes)]

    def fail_at(self, note: str, number: int) -> None:
        """From that build or call on, counted from 1, until the program is told otherwise."""
        self.failing = lambda each: each == note and self.notes.count(note) >= number - 1

    def records(self) -> dict[tuple[str, str], Record]:
        return {(record.case, record.system): record for record in Results.load(self._file).records}

    def _watched(self, *what: Any) -> WatchedWork:
        return WatchedWork(make_work(*what), self.notes, lambda note: self.failing(note))


class CountedDevice(Device):
    """A GPU that computes nothing, with an allocator of numbers."""

    def __init__(self, name: str) -> None:
        self.torch_device, self.is_gpu = torch.device(name), True
        self._held = self._peak = 0

    def __str__(self) -> str:
        return "counted"

    def wait(self) -> None:
        pass

    def free(self) -> None:
        pass

    def allocate(self, num_bytes: int) -> None:
        self._held += num_bytes
        self._peak = max(self._peak, self._held)

    def held_bytes(self) -> int:
        self._peak = self._held
        return self._held

    def take_peak_bytes(self) -> int:
        peak, self._peak = self._peak, self._held
        return peak

    def times_ms(self, call: Callable[[], object], num_calls: int) -> list[float]:
        return [1.0] * num_calls


class CountedWork:
    """Nothing but memory: of weights, what a first call takes at most and keeps, and what a later one takes."""

    latents = torch.zeros(1)

    def __init__(self, device: CountedDevice, sizes: Mapping[str, tuple[int, int, int, int]]) -> None:
        self._device, self._sizes = device, sizes

    def build(self, system: str) -> None:
        self._device.allocate(self._sizes[system][0])

    def bind(self, system: str, network: None) -> Callable[[Tensor], Tensor]:
        _, first, kept, later = self._sizes[system]
        sizes = [(first, kept)]

        def call(latents: Tensor) -> Tensor:
            most, rest = sizes.pop() if sizes else (later, 0)
            self._device.allocate(most)
            self._device.allocate(rest - most)
            return latents

        return call


@pytest.fixture
def program(monkeypatch, tmp_path):
    # The program has its process to itself and leaves these as it needs them.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    return Program(monkeypatch, tmp_path / "results.json")


@pytest.mark.parametrize("repeats", [2, 7, 20, 30])
def test_in_turns_each_has_all_its_calls_and_none_is_always_earlier(repeats):
    names = ["a", "b", "c"]
    taken = list(turns(names, repeats))
    calls = Counter[str]()
    for name, num_calls in taken:
        calls[name] += num_calls
    assert calls == dict.fromkeys(names, repeats)
    rounds = [[name for name, _ in taken[start : start + 3]] for start in range(0, len(taken), 3)]
    assert rounds == [names, names[::-1]] * (len(rounds) // 2)
    assert len(rounds) == min(6, repeats)


def test_the_systems_of_a_case_are_timed_in_turns_when_all_have_been_called(program):
    assert program("--repeats", "12") == [
        ("build diffusers", 1),
        ("diffusers", BEFORE),
        ("build t2v", 1),
        ("t2v", BEFORE),
        # Six rounds of two calls after one that is not timed; where a round goes backwards, two turns touch.
        ("diffusers", 3),
        ("t2v", 6),
        ("diffusers", 6),
        ("t2v", 6),
        ("diffusers", 6),
        ("t2v", 6),
        ("diffusers", 3),
    ]
    for record in program.records().values():
        assert record.figures is not None
        assert record.figures.repeats == 12
        assert record.figures.error < 1e-5
        assert record.figures.min_ms <= record.figures.median_ms <= record.figures.p90_ms


@pytest.mark.parametrize("note", ["build diffusers", "diffusers"])
def test_a_system_that_never_works_leaves_the_others_all_their_calls(program, note):
    program.fail_at(note, 1)
    program("--repeats", "4", "--no-errors")
    records = program.records()
    assert records[CASE, "diffusers"].failure == f"Broken: {note}"
    assert records[CASE, "t2v"].figures.repeats == 4


def test_a_system_that_fails_in_a_turn_says_beside_which_and_has_no_later_turn(program):
    program.fail_at("t2v", BEFORE + 2)  # the first timed call, with diffusers' turn before and after it
    order = program("--repeats", "4", "--no-errors")
    assert order[-2:] == [("t2v", 1), ("diffusers", 3 * 2)]
    records = program.records()
    assert records[CASE, "t2v"].failure == "Broken: t2v (beside diffusers)"
    assert records[CASE, "diffusers"].figures.repeats == 4


def test_only_what_is_missing_is_measured_when_called_again(program):
    program("--systems", "t2v", "--repeats", "2", "--no-errors")
    before = program.records()[CASE, "t2v"]
    names = {name for name, _ in program("--repeats", "2", "--no-errors")}
    assert names == {"build diffusers", "diffusers"}
    assert program.records()[CASE, "t2v"] == before
    assert program("--repeats", "2", "--no-errors") == []


def test_what_failed_before_is_tried_again_after_the_others(program):
    program.fail_at("build diffusers", 1)
    program("--systems", "diffusers", "--repeats", "2", "--no-errors")
    program.failing = lambda note: False
    assert program("--repeats", "2", "--no-errors") == [
        ("build t2v", 1),
        ("t2v", BEFORE + 2 * 2),
        ("build diffusers", 1),
        ("diffusers", BEFORE + 2 * 2),
    ]
    assert all(record.figures is not None for record in program.records().values())


def test_when_the_time_is_over_a_case_that_is_begun_is_finished_and_none_is_begun(program, monkeypatch, capsys):
    clock = SimpleNamespace(monotonic=lambda: 100.0 * len(program.notes), perf_counter=bench_gpu.time.perf_counter)
    monkeypatch.setattr(bench_gpu, "time", clock)
    program("--repeats", "2", "--no-errors", "--stop-after-s", "50", cases=(CASE, "decode1024"))
    assert set(program.records()) == {(CASE, "diffusers"), (CASE, "t2v")}
    assert "decode1024: not started, 50 s are over; call again to go on" in capsys.readouterr().err


def test_memory_is_of_each_system_beside_its_weights_and_not_of_others(program, monkeypatch):
    devices: list[CountedDevice] = []
    sizes = {"diffusers": (1000, 90, 3, 40), "t2v": (2000, 80, 0, 30), "t2v+graphs": (4000, 70, 5, 20)}

    def device(name: str) -> CountedDevice:
        devices.append(CountedDevice(name))
        return devices[-1]

    monkeypatch.setattr(bench_gpu, "Device", device)
    monkeypatch.setattr(bench_gpu, "make_work", lambda *what: CountedWork(devices[-1], sizes))
    program("--systems", *sizes, "--repeats", "2", "--no-errors")
    memory = {system: record.figures.memory_bytes for (_, system), record in program.records().items()}
    # What its first call keeps is a system's own; what it takes at most counts where that is a graph's.
    assert memory == {"diffusers": 3 + 40, "t2v": 30, "t2v+graphs": 70}
