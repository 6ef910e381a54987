"""An engine that launches the next step before the one at hand has ended, as it does on a GPU."""

import dataclasses
import itertools

import pytest
import torch

from t2v_core.engine import Cancelled, Engine, Failed, Finished, Profile, Request, RowBudgets, Stepped
from t2v_core.engine.profile import Measurement
from t2v_core.errors import EngineBroken, GenerationFailed, OutOfMemory


class Clock:
    """Stands until it is set."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Device:
    """A device whose steps last as long as these do, over and over, and that is idle where it is given none in time."""

    def __init__(self, clock, *, steps_s, launching_s):
        self.idle_s = 0.0
        self._clock, self._steps_s, self._launching_s = clock, itertools.cycle(steps_s), launching_s
        self._ends_s = None

    def mark_start(self, _):
        now_s = self._clock()
        if self._ends_s is not None:
            self.idle_s += max(0.0, now_s - self._ends_s)
        return Mark(self._clock, max(now_s, self._ends_s or now_s))

    def mark_end(self, _):
        self._ends_s = max(self._clock(), self._ends_s or 0.0) + next(self._steps_s)
        self._clock.now_s += self._launching_s
        return Mark(self._clock, self._ends_s)


class Mark:
    """When that device comes to a point in its queue, asked as torch's events are."""

    def __init__(self, clock, at_s):
        self._clock, self.at_s = clock, at_s

    def query(self):
        return self._clock() >= self.at_s

    def synchronize(self):
        self._clock.now_s = max(self._clock(), self.at_s)

    def elapsed_time(self, later):
        return 1000 * (later.at_s - self.at_s)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ahead(tiny_pipeline_float64, clock):
    return Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8), clock=clock, runs_ahead=True)


def use(device, monkeypatch):
    monkeypatch.setattr("t2v_core.engine.engine.mark", device.mark_start)
    monkeypatch.setattr("t2v_core.engine.launched.mark", device.mark_end)


def run_with_pauses(engine, clock):
    pauses = []
    while len(engine):
        engine.advance()
        pauses.append(engine.pause_s())
        clock.now_s += pauses[-1]
    return pauses


def steps_told(events):
    return [(event.id, event.step_index) for event in events if isinstance(event, Stepped)]


def test_a_step_is_told_when_the_next_is_launched(ahead, prepared, rows_of_each_call):
    ahead.add(Request("a", prepared(num_inference_steps=3)))
    told = [steps_told(ahead.advance()) for _ in range(4)]
    assert told == [[], [("a", 1)], [("a", 2)], [("a", 3)]]
    assert rows_of_each_call == [2, 2, 2]
    assert len(ahead) == 0
    assert ahead.advance() == []


def test_one_that_comes_before_the_next_launch_is_in_it(ahead, prepared, rows_of_each_call):
    ahead.add(Request("a", prepared(seed=1)))
    ahead.advance()
    ahead.add(Request("b", prepared(seed=2)))
    ahead.advance()
    assert rows_of_each_call == [2, 4]


def test_what_is_not_finite_fails_once_though_its_next_step_was_launched(ahead, prepared, alone):
    start = prepared(seed=1)
    trajectory = dataclasses.replace(start.trajectory, latents=torch.full_like(start.trajectory.latents, torch.nan))
    ahead.add(Request("bad", dataclasses.replace(start, trajectory=trajectory)))
    ahead.add(Request("good", prepared(seed=2)))
    events = []
    while len(ahead):
        events += ahead.advance()
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.id == "bad"
    assert isinstance(failed.error, GenerationFailed)
    assert "not finite" in str(failed.error)
    (finished,) = [event for event in events if isinstance(event, Finished)]
    torch.testing.assert_close(finished.trajectory.latents, alone(seed=2), rtol=1e-10, atol=1e-10)
    assert not [event for event in events[events.index(failed) + 1 :] if event.id == "bad"]


def test_nothing_is_told_of_a_request_that_left_while_its_step_ran(ahead, prepared, rows_of_each_call):
    ahead.add(Request("a", prepared(seed=1)))
    ahead.add(Request("b", prepared(seed=2)))
    ahead.advance()
    assert ahead.cancel("a") == [Cancelled("a")]
    ahead.add(Request("a", prepared(seed=3)))  # another of the same name
    assert steps_told(ahead.advance()) == [("b", 1)]
    assert steps_told(ahead.advance()) == [("b", 2), ("a", 1)]
    assert rows_of_each_call == [4, 4, 4]


def test_one_that_only_waits_for_its_last_step_to_end_cannot_be_taken(ahead, prepared):
    ahead.add(Request("a", prepared(num_inference_steps=1)))
    ahead.advance()
    assert ahead.look("a") is None
    assert ahead.take("a") is None
    assert [type(event) for event in ahead.advance()] == [Stepped, Finished]


def test_the_pause_ends_shortly_before_the_step_at_hand(tiny_pipeline_float64, prepared, clock):
    request = prepared()
    measured = Measurement(shape=request.trajectory.shape, rows=2, step_s=0.2, memory_bytes=0)
    budgets = RowBudgets(Profile(device="", dtype="", measurements=(measured,)))
    ahead = Engine(tiny_pipeline_float64.unet, budgets, clock=clock, runs_ahead=True)
    ahead.add(Request("a", request))
    assert ahead.pause_s() == 0.0  # nothing is running
    ahead.advance()
    assert 0.19 < ahead.pause_s() < 0.2  # as long as was measured, but for the launch
    clock.now_s += 0.15
    assert 0.04 < ahead.pause_s() < 0.05
    ahead.advance()  # the second begins when the first has ended, which is now
    assert 0.19 < ahead.pause_s() < 0.2
    clock.now_s += 1.0
    assert ahead.pause_s() == 0.0


def test_pauses_do_not_make_longer_pauses(tiny_pipeline_float64, prepared, clock):
    ahead = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=2), clock=clock, runs_ahead=True)
    ahead.add(Request("a", prepared(num_inference_steps=9)))
    ahead.advance()
    pauses = []
    while len(ahead):
        pauses.append(ahead.pause_s())
        clock.now_s += pauses[-1]
        ahead.advance()
        clock.now_s += 0.01
    assert max(pauses) == pytest.approx(pauses[0])


@pytest.mark.parametrize("launching_s", [0.001, 0.05], ids=["quickly", "slowly"])
def test_the_device_is_never_idle_however_long_launching_takes(ahead, prepared, clock, monkeypatch, launching_s):
    device = Device(clock, steps_s=[0.2], launching_s=launching_s)
    use(device, monkeypatch)
    request = prepared(num_inference_steps=9)
    ahead.add(Request("a", request))
    began_s = clock()
    pauses = run_with_pauses(ahead, clock)
    assert sum(pauses) > 1.0  # nor is it given more than the next
    assert device.idle_s == pytest.approx(0.0)
    assert clock() - began_s == pytest.approx(9 * 0.2, abs=0.01)
    assert ahead.counters[request.trajectory.shape].step_s == pytest.approx(9 * 0.2, abs=0.01)


def test_steps_that_reuse_features_are_as_short_as_they_are(tiny_pipeline_float64, prepared, clock, monkeypatch):
    ahead = Engine(tiny_pipeline_float64.unet, RowBudgets(), clock=clock, runs_ahead=True, cached_steps=1)
    whole_s, reusing_s = 0.16, 0.055
    device = Device(clock, steps_s=[whole_s, whole_s, *4 * (reusing_s, whole_s)], launching_s=0.001)  # of ten steps
    use(device, monkeypatch)
    ahead.add(Request("a", prepared(num_inference_steps=10)))
    began_s = clock()
    run_with_pauses(ahead, clock)
    assert device.idle_s == pytest.approx(0.0)
    assert clock() - began_s == pytest.approx(6 * whole_s + 4 * reusing_s, abs=0.01)


def test_a_first_step_that_compiles_makes_no_later_pause_longer(ahead, prepared, clock, monkeypatch):
    device = Device(clock, steps_s=[3.0, *8 * [0.05]], launching_s=0.001)
    use(device, monkeypatch)
    ahead.add(Request("a", prepared(num_inference_steps=9)))
    run_with_pauses(ahead, clock)
    assert device.idle_s < 0.05  # once, by what an unmeasured step is taken for


def test_steps_and_their_time_are_counted_as_they_end(ahead, prepared, clock):
    request = prepared(num_inference_steps=3)
    ahead.add(Request("a", request))
    while len(ahead):
        ahead.advance()
        clock.now_s += 0.25
    counters = ahead.counters[request.trajectory.shape]
    assert counters.steps == 3
    assert counters.step_s == pytest.approx(0.75)


def test_giving_everything_up_forgets_the_step_at_hand(ahead, prepared, alone):
    ahead.add(Request("a", prepared(seed=1)))
    ahead.advance()
    assert [event.id for event in ahead.fail_all(EngineBroken("lost"))] == ["a"]
    ahead.add(Request("a", prepared(seed=2)))
    events = []
    while len(ahead):
        events += ahead.advance()
    assert steps_told(events) == [("a", step) for step in range(1, 6)]
    torch.testing.assert_close(events[-1].trajectory.latents, alone(seed=2), rtol=1e-10, atol=1e-10)


def test_a_step_does_all_at_once_whatever_runs_ahead(ahead, prepared):
    ahead.add(Request("a", prepared(num_inference_steps=2)))
    ahead.advance()
    assert steps_told(ahead.step()) == [("a", 1), ("a", 2)]


def test_an_engine_that_nobody_needs_keeps_no_step(ahead, prepared):
    for leave in (ahead.cancel, ahead.take):
        ahead.add(Request("a", prepared()))
        ahead.advance()
        leave("a")
        assert not ahead._launched
        assert ahead.advance() == []


def test_an_end_is_told_though_the_step_before_could_not_be_waited_for(ahead, prepared, monkeypatch):
    def fail(error):
        def call(*_):
            raise error

        return call

    ahead.add(Request("a", prepared()))
    ahead.advance()
    monkeypatch.setattr(ahead, "_denoise", fail(OutOfMemory("no room")))
    monkeypatch.setattr(ahead, "_settle", fail(RuntimeError("the GPU is lost")))
    with pytest.raises(RuntimeError):
        ahead.advance()
    (failed,) = ahead.fail_all(EngineBroken("lost"))
    assert isinstance(failed, Failed)
    assert failed.id == "a"
    assert ahead.fail_all(EngineBroken("lost")) == []
