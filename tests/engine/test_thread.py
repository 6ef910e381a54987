"""The engine in its own thread: what callers in other threads see."""

import dataclasses
import gc
import logging
import random
import threading
import time

import pytest
import torch

from t2v_core.engine import Admitted, Cancelled, Engine, EngineThread, Failed, Finished, Profile, Request, RowBudgets
from t2v_core.engine.events import ENDINGS
from t2v_core.engine.launched import Launched
from t2v_core.engine.profile import Measurement
from t2v_core.errors import EngineBroken, InvalidRequest
from t2v_core.trajectory import Trajectory


class Events:
    """Collects what a thread hands out, and waits for endings."""

    def __init__(self):
        self.all = []
        self._changed = threading.Condition()

    def __call__(self, event):
        with self._changed:
            self.all.append(event)
            self._changed.notify_all()

    def ending_of(self, request_id):
        with self._changed:
            assert self._changed.wait_for(lambda: self._endings(request_id), timeout=120)
        (ending,) = self._endings(request_id)
        return ending

    def _endings(self, request_id):
        return [event for event in self.all if event.id == request_id and isinstance(event, ENDINGS)]


@pytest.fixture
def running(engine):
    events = Events()
    thread = EngineThread(engine, events)
    yield thread, events
    thread.close()


def test_requests_from_many_threads_each_get_their_own_video(running, prepared, alone):
    thread, events = running

    def ask(seed):
        thread.add(Request(str(seed), prepared(seed=seed)))

    for seed in range(6):
        prepared(seed=seed)
    callers = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for caller in callers:
        caller.start()
    for seed in range(6):
        ending = events.ending_of(str(seed))
        assert isinstance(ending, Finished)
        torch.testing.assert_close(ending.trajectory.latents, alone(seed=seed), rtol=1e-10, atol=1e-10)


def test_a_cancelled_request_ends_long_before_its_steps(running, prepared):
    thread, events = running
    thread.add(Request("a", prepared(num_inference_steps=999)))
    thread.cancel("a")
    assert events.ending_of("a") == Cancelled("a")
    thread.cancel("a")  # it has ended: nothing happens
    thread.add(Request("a", prepared(num_inference_steps=2)))
    while not any(isinstance(event, Finished) for event in events.all):
        time.sleep(0.01)


def test_a_request_taken_out_goes_on_in_another_engine(running, prepared, alone, tiny_pipeline_float64):
    thread, events = running
    settings = {"seed": 4, "num_inference_steps": 100}
    thread.add(Request("a", prepared(**settings)))
    while not events.all[3:]:
        time.sleep(0.01)
    looked = thread.look("a").result(60)
    taken = thread.take("a").result(60)
    assert 0 < looked.step_index <= taken.step_index < 100
    assert thread.take("a").result(60) is None
    assert thread.look("a").result(60) is None
    others = Events()
    there = EngineThread(Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8)), others)
    there.add(Request("a", dataclasses.replace(prepared(**settings), trajectory=taken)))
    ending = others.ending_of("a")
    there.close()
    torch.testing.assert_close(ending.trajectory.latents, alone(**settings), rtol=1e-10, atol=1e-10)


def test_an_id_is_refused_while_it_is_in_use_and_free_after(running, prepared):
    thread, events = running
    thread.add(Request("a", prepared(num_inference_steps=400)))
    with pytest.raises(InvalidRequest, match="use another id"):
        thread.add(Request("a", prepared()))
    thread.cancel("a")
    events.ending_of("a")
    thread.add(Request("a", prepared(num_inference_steps=2)))


def test_closing_ends_every_request_and_takes_no_more(running, prepared):
    thread, events = running
    for seed in range(3):
        thread.add(Request(str(seed), prepared(seed=seed, num_inference_steps=999)))
    thread.close()
    assert [events.ending_of(str(seed)) for seed in range(3)] == [Cancelled(str(seed)) for seed in range(3)]
    with pytest.raises(EngineBroken, match="closed"):
        thread.add(Request("late", prepared()))
    assert thread.look("0").result(1) is None


def test_a_breakdown_fails_the_requests_at_hand_and_is_told_and_the_thread_lives_on(
    running, prepared, tiny_pipeline_float64, caplog
):
    thread, events = running

    def break_down(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    handle = tiny_pipeline_float64.unet.register_forward_pre_hook(break_down)
    with caplog.at_level(logging.CRITICAL):
        thread.add(Request("a", prepared(num_inference_steps=3)))
        failed = events.ending_of("a")
    handle.remove()
    assert isinstance(failed, Failed)
    assert "illegal memory access" in str(failed.error)
    assert "illegal memory access" in thread.failure
    thread.add(Request("b", prepared(num_inference_steps=3)))
    assert isinstance(events.ending_of("b"), Finished)
    assert thread.failure is None


def test_a_receiver_that_fails_does_not_stop_the_engine(tiny_pipeline_float64, prepared):
    seen = []

    def receive(event):
        seen.append(event)
        raise ValueError("receiver")

    thread = EngineThread(Engine(tiny_pipeline_float64.unet, RowBudgets()), receive)
    thread.add(Request("a", prepared(num_inference_steps=2)))
    deadline = time.monotonic() + 60
    while not any(isinstance(event, Finished) for event in seen):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread.close()


@pytest.fixture
def held_step(tiny_pipeline_float64):
    """Holds the first step up: `begun` says that the engine is in it, `go` lets it and all later ones through."""
    begun, go = threading.Event(), threading.Event()

    def hold(*_):
        begun.set()
        assert go.wait(120)

    handle = tiny_pipeline_float64.unet.register_forward_pre_hook(hold)
    yield begun, go
    go.set()
    handle.remove()


@pytest.mark.parametrize("question", ["look", "take"])
def test_an_answer_nobody_waits_for_stops_neither_the_engine_nor_the_request(running, held_step, prepared, question):
    (thread, events), (begun, go) = running, held_step
    thread.add(Request("a", prepared(num_inference_steps=3)))
    assert begun.wait(120)
    answer = getattr(thread, question)("a")
    assert answer.cancel()
    go.set()
    assert isinstance(events.ending_of("a"), Finished)


def test_a_question_that_fails_tells_who_asked_and_takes_nothing(running, held_step, prepared, monkeypatch):
    (thread, _), (begun, go) = running, held_step
    thread.add(Request("a", prepared(num_inference_steps=999)))
    assert begun.wait(120)

    def run_out(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    with monkeypatch.context() as patch:
        patch.setattr("t2v_core.engine.engine._apart", run_out)
        answers = [thread.look("a"), thread.take("a")]
        go.set()
        for answer in answers:
            with pytest.raises(torch.OutOfMemoryError):
                answer.result(60)
    assert thread.take("a").result(60) is not None


def test_what_cannot_be_taken_in_fails_alone(running, prepared):
    thread, events = running
    thread.add(Request("whole", prepared(num_inference_steps=30)))
    start = prepared()
    done = dataclasses.replace(start, trajectory=dataclasses.replace(start.trajectory, step_index=5))
    thread.add(Request("done", done))
    thread.add(Request("of no class", start, priority="soon"))
    assert isinstance(events.ending_of("done").error, InvalidRequest)
    assert "'soon'" in str(events.ending_of("of no class").error)
    assert isinstance(events.ending_of("whole"), Finished)
    thread.add(Request("done", start))
    assert thread.take("done").result(60) is not None


def test_an_id_is_free_once_its_request_is_taken_out(running, prepared):
    thread, _ = running
    thread.add(Request("a", prepared(num_inference_steps=999)))
    assert thread.take("a").result(60) is not None
    thread.add(Request("a", prepared(num_inference_steps=999)))


def test_the_time_a_request_waits_for_the_step_at_hand_counts(held_step, tiny_pipeline_float64, prepared):
    (begun, go), events, now = held_step, Events(), [0.0]
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8), clock=lambda: now[0])
    thread = EngineThread(engine, events)
    thread.add(Request("first", prepared(seed=1)))
    assert begun.wait(120)
    thread.add(Request("second", prepared(seed=2)))
    now[0] = 100.0
    go.set()
    events.ending_of("second")
    thread.close()
    assert Admitted("second", 100.0) in events.all


def test_how_long_the_engine_has_been_at_one_thing_is_known_whatever_is_asked_of_it(
    held_step, tiny_pipeline_float64, prepared
):
    (begun, go), events, now = held_step, Events(), [0.0]
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8), clock=lambda: now[0])
    thread = EngineThread(engine, events)
    now[0] = 50.0
    assert thread.busy_s == 0.0  # nothing was asked yet
    thread.add(Request("first", prepared(seed=1)))
    assert begun.wait(120)
    now[0] = 80.0
    thread.add(Request("second", prepared(seed=2)))
    thread.cancel("first")
    assert thread.busy_s == 30.0
    go.set()
    assert isinstance(events.ending_of("second"), Finished)
    now[0] = 100.0
    deadline = time.monotonic() + 60
    while thread.busy_s:  # it has only just told of the end
        assert time.monotonic() < deadline
        time.sleep(0.001)
    thread.close()
    now[0] = 130.0
    assert thread.busy_s == 0.0


def test_a_wait_for_the_device_is_work(tiny_pipeline_float64, prepared, monkeypatch):
    waits, may_end = threading.Event(), threading.Event()

    def wait(launched):
        waits.set()
        assert may_end.wait(120)
        return wait_for_it(launched)

    wait_for_it = Launched.wait
    monkeypatch.setattr(Launched, "wait", wait)
    now, events = [0.0], Events()
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8), clock=lambda: now[0], runs_ahead=True)
    thread = EngineThread(engine, events)
    thread.add(Request("a", prepared(num_inference_steps=2)))
    assert waits.wait(120)
    now[0] = 30.0
    assert thread.busy_s == 30.0
    may_end.set()
    assert isinstance(events.ending_of("a"), Finished)
    thread.close()


def test_closing_returns_when_all_has_ended_whoever_closes(held_step, tiny_pipeline_float64, prepared):
    (begun, go), events = held_step, Events()
    thread = EngineThread(Engine(tiny_pipeline_float64.unet, RowBudgets()), events)
    thread.add(Request("a", prepared(num_inference_steps=999)))
    assert begun.wait(120)
    closers = [threading.Thread(target=thread.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    closers[1].join(0.2)
    assert all(closer.is_alive() for closer in closers)
    go.set()
    for closer in closers:
        closer.join(120)
    assert events.all[-1] == Cancelled("a")


def test_after_a_breakdown_in_a_preview_every_request_has_one_ending(
    held_step, tiny_pipeline_float64, prepared, caplog
):
    def break_down(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    (begun, go), events = held_step, Events()
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8), previewer=break_down)
    thread = EngineThread(engine, events)
    thread.add(Request("first", prepared(seed=3, num_inference_steps=999)))
    assert begun.wait(120)
    start = prepared(seed=1)
    last_step = dataclasses.replace(start, trajectory=dataclasses.replace(start.trajectory, step_index=4))
    thread.add(Request("at its end", last_step))
    thread.add(Request("on its way", prepared(seed=2), preview_every=1))
    with caplog.at_level(logging.CRITICAL):
        go.set()
        assert all(isinstance(events.ending_of(name), Failed) for name in ("first", "at its end", "on its way"))
    thread.close()
    assert not thread._live


def test_nothing_is_left_of_ten_thousand_requests_that_came_and_went(tiny_pipeline_float64, prepared):
    draw, endings, engine = random.Random(0), {}, Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8))

    def receive(event):
        if isinstance(event, ENDINGS):
            endings[event.id] = type(event)

    starts = [prepared(seed=seed, num_inference_steps=steps) for seed, steps in ((1, 2), (2, 50), (3, 999))]
    gc.collect()
    before = sum(isinstance(thing, Trajectory) for thing in gc.get_objects())
    thread = EngineThread(engine, receive)
    live = []
    for number in range(10_000):
        thread.add(Request(str(number), draw.choice(starts), priority=draw.choice(("urgent", "normal", "low"))))
        live.append(str(number))
        if draw.random() < 0.05:
            time.sleep(draw.random() * 0.01)
        while len(live) > draw.randrange(1, 40):
            thread.cancel(live.pop(draw.randrange(len(live))))
    for request_id in live:
        thread.cancel(request_id)
    while len(endings) < 10_000:
        time.sleep(0.01)
    thread.close()
    assert set(endings.values()) <= {Cancelled, Finished}
    assert len(engine) == 0
    assert not thread._live
    (counters,) = engine.counters.values()
    assert counters.added == 10_000 == counters.cancelled + counters.finished
    del thread, engine
    gc.collect()
    assert sum(isinstance(thing, Trajectory) for thing in gc.get_objects()) == before


def test_an_id_stays_taken_while_its_last_step_ends(running, prepared, engine, monkeypatch):
    thread, _ = running
    thread.add(Request("a", prepared(num_inference_steps=999)))
    monkeypatch.setattr(engine, "take", lambda _: None)  # as the engine says then
    assert thread.take("a").result(10) is None
    with pytest.raises(InvalidRequest, match="already being denoised"):
        thread.add(Request("a", prepared()))


def test_a_last_step_that_was_launched_is_not_thrown_away(tiny_pipeline_float64, prepared):
    request, events = prepared(num_inference_steps=1), Events()
    measured = Measurement(shape=request.trajectory.shape, rows=2, step_s=60.0, memory_bytes=0)
    budgets = RowBudgets(Profile(device="", dtype="", measurements=(measured,)))
    engine = Engine(tiny_pipeline_float64.unet, budgets, runs_ahead=True)
    thread = EngineThread(engine, events)
    thread.add(Request("a", request))
    while not engine._launched:  # it is told when the next is launched, in a minute
        time.sleep(0.001)
    thread.close()
    assert isinstance(events.ending_of("a"), Finished)
