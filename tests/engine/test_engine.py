"""A batch that changes at every step gives each request what it gets alone: in float64, to 1e-10."""

import dataclasses
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2v_core.config import SAMPLER_NAMES
from t2v_core.engine import Admitted, Cancelled, Engine, Failed, Finished, Preview, Request, RowBudgets, Stepped
from t2v_core.errors import GenerationFailed, InvalidRequest, OutOfMemory
from t2v_core.guidance import condition
from t2v_core.trajectory import Trajectory

MIXED = [
    {"seed": 1, "sampler": "dpmpp_2m", "num_inference_steps": 5},
    {"seed": 2, "sampler": "euler_a", "num_inference_steps": 7},
    {"seed": 3, "sampler": "unipc", "num_inference_steps": 4, "guidance_scale": 1.0},
    {"seed": 4, "sampler": "ddim", "eta": 1.0, "num_inference_steps": 6, "guidance_scale": 3.0},
    {"seed": 5, "sampler": "dpmpp_3m", "num_inference_steps": 8, "width": 24},
    {"seed": 6, "sampler": "euler", "num_inference_steps": 3, "num_frames": 3},
    {"seed": 7, "prompt": "word " * 90, "num_inference_steps": 4},
]


def run_to_end(engine):
    """Every step that is left: all events, and the latents of what finished."""
    events = []
    while len(engine):
        events += engine.advance()
    return events, {event.id: event.trajectory.latents for event in events if isinstance(event, Finished)}


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_a_request_joining_midway_gets_the_video_it_gets_alone(engine, prepared, alone):
    engine.add(Request("a", prepared(seed=1, num_inference_steps=8)))
    for _ in range(3):
        engine.step()
    engine.add(Request("b", prepared(seed=2, num_inference_steps=8)))
    _, latents = run_to_end(engine)
    assert_same(latents["a"], alone(seed=1, num_inference_steps=8))
    assert_same(latents["b"], alone(seed=2, num_inference_steps=8))


def test_requests_that_differ_in_everything_share_an_engine(engine, prepared, alone, rows_of_each_call):
    for number, wanted in enumerate(MIXED):
        engine.add(Request(str(number), prepared(**wanted)))
    _, latents = run_to_end(engine)
    assert max(rows_of_each_call) == 7  # three requests with guidance and one without, of one shape
    for number, wanted in enumerate(MIXED):
        assert_same(latents[str(number)], alone(**wanted))


@settings(max_examples=30)
@given(data=st.data(), budget=st.integers(1, 8))
def test_any_order_of_arrivals_and_cancels_gives_each_what_it_gets_alone(
    tiny_pipeline_float64, prepared, alone, data, budget
):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=budget), runs_ahead=data.draw(st.booleans()))
    waiting = data.draw(st.permutations(range(len(MIXED))))
    running, cancelled, finished = set(), set(), {}
    while waiting or len(engine):
        action = data.draw(st.sampled_from(("add", "step", "step", "cancel")))
        if action == "add" and waiting:
            number = waiting.pop()
            priority = data.draw(st.sampled_from(("urgent", "normal", "low")))
            engine.add(Request(str(number), prepared(**MIXED[number]), priority=priority))
            running.add(number)
        elif action == "cancel" and running and len(cancelled) < 2:
            number = data.draw(st.sampled_from(sorted(running)))
            assert engine.cancel(str(number)) == [Cancelled(str(number))]
            running.remove(number)
            cancelled.add(number)
        else:
            ended = [event for event in engine.advance() if isinstance(event, Finished)]
            finished |= {int(event.id): event.trajectory.latents for event in ended}
            running -= finished.keys()
    assert finished.keys() | cancelled == set(range(len(MIXED)))
    for number, latents in finished.items():
        assert_same(latents, alone(**MIXED[number]))


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_a_request_moved_to_another_engine_at_any_step_ends_as_if_never_stopped(
    tiny_pipeline_float64, prepared, alone, sampler
):
    settings = {"sampler": sampler, "num_inference_steps": 5, "seed": 9}
    for stop in range(5):
        here = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8))
        here.add(Request("other", prepared(seed=2)))
        here.add(Request("moved", prepared(**settings)))
        for _ in range(stop):
            here.step()
        saved = here.take("moved").to_bytes()
        assert "moved" not in here.ids
        there = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8))
        moved = dataclasses.replace(prepared(**settings), trajectory=Trajectory.from_bytes(saved))
        there.add(Request("moved", moved))
        assert_same(run_to_end(there)[1]["moved"], alone(**settings))
        assert_same(run_to_end(here)[1]["other"], alone(seed=2))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_resumed_in_the_same_batch_it_is_the_same_to_the_bit(tiny_pipeline, sampler):
    def engine_with(trajectories):
        engine = Engine(tiny_pipeline.unet, RowBudgets(unmeasured_rows=8))
        for seed, trajectory in trajectories.items():
            params = tiny_pipeline.params("a panda", seed=seed, sampler=sampler, num_inference_steps=6, num_frames=2)
            start = tiny_pipeline.prepare(params)
            engine.add(Request(str(seed), dataclasses.replace(start, trajectory=trajectory or start.trajectory)))
        return engine

    straight = engine_with({1: None, 2: None})
    for _ in range(3):
        straight.step()
    saved = {seed: straight.look(str(seed)).to_bytes() for seed in (1, 2)}
    resumed = engine_with({seed: Trajectory.from_bytes(file) for seed, file in saved.items()})
    expected, actual = run_to_end(straight)[1], run_to_end(resumed)[1]
    assert all(torch.equal(actual[name], expected[name]) for name in ("1", "2"))


def test_the_events_of_a_request_come_once_and_in_order(engine, prepared):
    engine.add(Request("a", prepared(num_inference_steps=3)))
    events, _ = run_to_end(engine)
    assert [type(event) for event in events] == [Admitted, Stepped, Stepped, Stepped, Finished]
    assert [event.step_index for event in events if isinstance(event, Stepped)] == [1, 2, 3]
    assert events[1].num_steps == 3


def test_a_cancelled_request_is_out_of_the_next_step(engine, prepared, rows_of_each_call):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        engine.add(Request(name, prepared(seed=seed)))
    engine.step()
    assert engine.cancel("b") == [Cancelled("b")]
    assert engine.cancel("b") == []
    engine.step()
    assert rows_of_each_call == [6, 4]


def test_a_text_is_read_once_while_the_batch_stays_the_same(engine, prepared, tiny_pipeline_float64):
    reads = []
    reader = tiny_pipeline_float64.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    handle = reader.register_forward_hook(lambda *_: reads.append(1))
    try:
        engine.add(Request("a", prepared(seed=1, num_inference_steps=8)))
        for _ in range(3):
            engine.step()
        assert len(reads) == 1
        engine.add(Request("b", prepared(seed=2, num_inference_steps=8)))
        engine.step()
        engine.step()
        assert len(reads) == 2
    finally:
        handle.remove()


def test_an_urgent_request_sets_a_low_one_aside_and_both_are_as_alone(tiny_pipeline_float64, prepared, alone):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=2))
    engine.add(Request("low", prepared(seed=1, num_inference_steps=6), priority="low"))
    for _ in range(2):
        engine.step()
    engine.add(Request("urgent", prepared(seed=2, num_inference_steps=3), priority="urgent"))
    events, latents = run_to_end(engine)
    assert [event.id for event in events if isinstance(event, Finished)] == ["urgent", "low"]
    assert_same(latents["low"], alone(seed=1, num_inference_steps=6))
    assert_same(latents["urgent"], alone(seed=2, num_inference_steps=3))
    (counters,) = engine.counters.values()
    assert counters.set_aside == 1


def test_a_deadline_brings_a_request_forward(tiny_pipeline_float64, prepared):
    now = itertools.count()
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=2), clock=lambda: float(next(now)))
    engine.add(Request("a", prepared(seed=1)))
    engine.add(Request("b", prepared(seed=2), deadline_s=1.0))
    events, _ = run_to_end(engine)
    assert [event.id for event in events if isinstance(event, Finished)] == ["b", "a"]


def test_a_request_that_waited_elsewhere_goes_first(tiny_pipeline_float64, prepared):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=2))
    engine.add(Request("here", prepared(seed=1)))
    engine.add(Request("moved", prepared(seed=2), waited_s=20.0))
    events, _ = run_to_end(engine)
    assert [event.id for event in events if isinstance(event, Finished)] == ["moved", "here"]
    assert 20.0 <= next(event.queue_s for event in events if isinstance(event, Admitted)) < 80.0


def fail_above(unet, max_rows, error):
    def check(_, arguments):
        if len(arguments[3]) > max_rows:
            raise error

    return unet.register_forward_pre_hook(check)


def test_when_memory_runs_out_the_batch_is_halved_and_nothing_is_lost(
    tiny_pipeline_float64, prepared, alone, rows_of_each_call
):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8))
    handle = fail_above(tiny_pipeline_float64.unet, 4, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    try:
        for seed in range(4):
            engine.add(Request(str(seed), prepared(seed=seed, sampler="euler_a")))
        events, latents = run_to_end(engine)
    finally:
        handle.remove()
    assert rows_of_each_call[:2] == [8, 4]
    assert max(rows_of_each_call[1:]) == 4
    assert not any(isinstance(event, Failed) for event in events)
    assert [event.id for event in events if isinstance(event, Admitted)] == ["0", "1", "2", "3"]
    for seed in range(4):
        assert_same(latents[str(seed)], alone(seed=seed, sampler="euler_a"))


def test_a_request_that_does_not_fit_alone_fails_and_the_others_go_on(tiny_pipeline_float64, prepared, alone):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8))
    handle = fail_above(tiny_pipeline_float64.unet, 1, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    try:
        engine.add(Request("two rows", prepared(seed=1)))
        engine.add(Request("one row", prepared(seed=2, guidance_scale=1.0)))
        events, latents = run_to_end(engine)
    finally:
        handle.remove()
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.id == "two rows"
    assert isinstance(failed.error, OutOfMemory)
    assert "smaller size" in str(failed.error)
    # Any of these would keep the memory of the step.
    assert (failed.error.__traceback__, failed.error.__context__) == (None, None)
    assert failed.error.args == (str(failed.error),)
    assert_same(latents["one row"], alone(seed=2, guidance_scale=1.0))


def run_out_at(unet, calls):
    """At these calls of the network, by their number, a library finds no memory that torch has not taken."""
    numbers = itertools.count(1)

    def check(*_):
        if next(numbers) in calls:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    return unet.register_forward_pre_hook(check)


def test_a_request_alone_is_tried_again_in_the_memory_that_was_freed(engine, tiny_pipeline_float64, prepared, alone):
    handle = run_out_at(tiny_pipeline_float64.unet, {1, 3, 5})
    try:
        engine.add(Request("a", prepared()))
        events, latents = run_to_end(engine)
    finally:
        handle.remove()
    assert {type(event) for event in events} == {Admitted, Stepped, Finished}
    assert_same(latents["a"], alone())
    (counters,) = engine.counters.values()
    assert counters.out_of_memory == 3


def test_who_does_not_fit_alone_is_tried_twice_whoever_takes_a_step_meanwhile(
    engine, tiny_pipeline_float64, prepared, rows_of_each_call
):
    handle = fail_above(tiny_pipeline_float64.unet, 1, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    try:
        engine.add(Request("too large", prepared(seed=1)))
        events = engine.step()
        engine.add(Request("urgent", prepared(seed=2, guidance_scale=1.0), priority="urgent"))
        events += run_to_end(engine)[0]
    finally:
        handle.remove()
    assert [event.id for event in events if isinstance(event, Finished)] == ["urgent"]
    assert [event.id for event in events if isinstance(event, Failed)] == ["too large"]
    assert rows_of_each_call == [2, *[1] * 5, 2]


def test_the_budget_grows_back_when_memory_seems_free_again(tiny_pipeline_float64, prepared, rows_of_each_call):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8))
    handle = fail_above(tiny_pipeline_float64.unet, 2, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    for seed in range(3):
        engine.add(Request(str(seed), prepared(seed=seed, num_inference_steps=250, guidance_scale=1.0)))
    for _ in range(5):
        engine.step()
    handle.remove()
    assert rows_of_each_call[1:] == [1] * 4
    for _ in range(200):
        engine.step()
    assert rows_of_each_call[-1] > 1


def test_numbers_that_are_not_finite_fail_their_own_request_only(engine, prepared, alone):
    start = prepared(seed=1)
    latents = start.trajectory.latents.clone()
    latents[0, 0, 0, 0] = float("nan")
    broken = dataclasses.replace(start, trajectory=dataclasses.replace(start.trajectory, latents=latents))
    engine.add(Request("broken", broken))
    engine.add(Request("whole", prepared(seed=2)))
    events, finished = run_to_end(engine)
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.id == "broken"
    assert isinstance(failed.error, GenerationFailed)
    assert "step 1 of 5" in str(failed.error)
    assert_same(finished["whole"], alone(seed=2))


def test_the_counters_add_up(tiny_pipeline_float64, prepared):
    now = itertools.count()
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=4), clock=lambda: float(next(now)))
    for seed in range(3):
        engine.add(Request(str(seed), prepared(seed=seed, num_inference_steps=4)))
    engine.add(Request("dropped", prepared(seed=9)))
    engine.cancel("dropped")
    run_to_end(engine)
    (counters,) = engine.counters.values()
    assert (counters.added, counters.admitted, counters.finished, counters.cancelled) == (4, 3, 3, 1)
    assert counters.rows == 3 * 4 * 2
    assert counters.steps == 8  # two together, then the third
    assert counters.budget_rows == 8 * 4
    assert counters.step_s == 8
    assert counters.queue_s > 0


def test_what_cannot_be_added_is_refused(engine, prepared, tiny_pipeline_float64):
    engine.add(Request("a", prepared()))
    with pytest.raises(InvalidRequest, match="use another id"):
        engine.add(Request("a", prepared()))
    run_to_end(engine)
    done = prepared().trajectory
    done = dataclasses.replace(done, step_index=done.num_steps)
    with pytest.raises(InvalidRequest, match="no steps left"):
        engine.add(Request("b", dataclasses.replace(prepared(), trajectory=done)))


def with_trajectory(start, **changes):
    return dataclasses.replace(start, trajectory=dataclasses.replace(start.trajectory, **changes))


def with_conditioning(start, **changes):
    return dataclasses.replace(start, conditioning=start.conditioning._replace(**changes))


MISFITS = {
    "type of its latents": lambda a: with_trajectory(a, latents=a.trajectory.latents.float()),
    "device of its latents": lambda a: with_trajectory(a, latents=a.trajectory.latents.to("meta")),
    "shape of its latents": lambda a: with_trajectory(a, latents=a.trajectory.latents[:3]),
    "number of dimensions of its latents": lambda a: with_trajectory(a, latents=a.trajectory.latents[:, 0]),
    "type of its history": lambda a: with_trajectory(a, history=a.trajectory.history.float()),
    "shape of its history": lambda a: with_trajectory(a, history=a.trajectory.history[:1]),
    "number of steps of its plan": lambda a: with_trajectory(a, num_steps=6),
    "type of its prompt": lambda a: with_conditioning(a, prompt=a.conditioning.prompt.half()),
    "shape of its prompt": lambda a: with_conditioning(a, prompt=a.conditioning.prompt[:, :5]),
    "shape of its negative prompt": lambda a: with_conditioning(a, negative=a.conditioning.negative[:70]),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_would_fail_or_change_its_neighbours_is_refused_by_name(engine, prepared, what):
    with pytest.raises(InvalidRequest, match=f"request misfit: the {what} must be .* not .*; prepare it"):
        engine.add(Request("misfit", MISFITS[what](prepared())))
    assert len(engine) == 0


@pytest.mark.parametrize("ended", ["finished", "cancelled", "taken"])
def test_an_id_that_comes_again_with_another_prompt_gets_its_own_video(engine, prepared, alone, ended):
    engine.add(Request("neighbour", prepared(num_inference_steps=8)))
    engine.add(Request("a", prepared(prompt="a red circle", num_inference_steps=4)))
    engine.step()
    if ended == "finished":
        for _ in range(3):
            engine.step()
    elif ended == "cancelled":
        engine.cancel("a")
    else:
        engine.take("a")
    engine.add(Request("a", prepared(prompt="rain in the night", num_inference_steps=4)))
    expected = alone(prompt="rain in the night", num_inference_steps=4)
    assert not torch.allclose(expected, alone(prompt="a red circle", num_inference_steps=4))
    assert_same(run_to_end(engine)[1]["a"], expected)


def test_an_id_that_comes_again_was_not_set_aside(tiny_pipeline_float64, prepared):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=2))
    engine.add(Request("a", prepared()))
    engine.step()
    engine.cancel("a")
    engine.add(Request("b", prepared(), waited_s=60.0))
    engine.add(Request("a", prepared()))
    engine.step()
    (counters,) = engine.counters.values()
    assert counters.set_aside == 0


def test_what_leaves_the_engine_holds_no_memory_of_its_neighbours(engine, prepared):
    for seed in (1, 2, 3):
        engine.add(Request(str(seed), prepared(seed=seed, num_inference_steps=4)))
    engine.step()
    left = [engine.look("1"), engine.take("2")]
    left += [event.trajectory for _ in range(3) for event in engine.step() if isinstance(event, Finished)]
    assert len(left) == 4
    for trajectory in left:
        for tensor in (trajectory.latents, trajectory.history):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.fixture
def texts_read(tiny_pipeline_float64):
    """Weak references to what each call of the network was given of the texts."""
    texts = []

    def remember(_, arguments):
        texts.append([weakref.ref(keys) for keys, _ in arguments[2].values()])

    handle = tiny_pipeline_float64.unet.register_forward_pre_hook(remember)
    yield texts
    handle.remove()


def test_an_idle_engine_holds_no_memory_of_the_last_batch(engine, prepared, texts_read):
    engine.add(Request("a", prepared(num_inference_steps=4)))
    engine.step()
    assert all(text() is not None for text in texts_read[0])
    engine.cancel("a")
    assert all(text() is None for text in texts_read[0])


def test_a_new_batch_is_read_when_the_memory_of_the_last_is_free(engine, prepared, texts_read, monkeypatch):
    engine.add(Request("a", prepared(seed=1)))
    engine.step()
    engine.add(Request("b", prepared(seed=2)))
    alive = []

    def look_first(unet, conditionings):
        alive.append(any(text() is not None for text in texts_read[0]))
        return condition(unet, conditionings)

    monkeypatch.setattr("t2v_core.engine.engine.condition", look_first)
    engine.step()
    assert alive == [False]


def test_a_request_on_its_way_is_due_by_the_steps_it_has_left(tiny_pipeline_float64, prepared):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=2), clock=lambda: 0.0)
    engine.add(Request("new", prepared(seed=1, num_inference_steps=4)))
    nearly_done = with_trajectory(prepared(seed=2, num_inference_steps=8), step_index=6)
    engine.add(Request("nearly done", nearly_done))
    events, _ = run_to_end(engine)
    assert [event.id for event in events if isinstance(event, Finished)] == ["nearly done", "new"]


def test_riders_of_an_urgent_request_are_limited(tiny_pipeline_float64, prepared, rows_of_each_call):
    class FourWhereUrgent(RowBudgets):
        def rows(self, group, demand):
            return 4 if demand.urgent_rows else 8

    engine = Engine(tiny_pipeline_float64.unet, FourWhereUrgent())
    for seed in (1, 2, 3):
        engine.add(Request(str(seed), prepared(seed=seed)))
    engine.step()
    engine.add(Request("urgent", prepared(seed=4), priority="urgent"))
    engine.step()
    assert rows_of_each_call == [6, 4]


def test_no_step_is_fuller_than_full(tiny_pipeline_float64, prepared):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=1))
    engine.add(Request("over the budget, and alone", prepared()))
    run_to_end(engine)
    (counters,) = engine.counters.values()
    assert counters.rows == counters.budget_rows == 5 * 2


def test_the_counters_tell_how_each_request_ended(tiny_pipeline_float64, prepared):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8))
    handle = fail_above(tiny_pipeline_float64.unet, 1, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    for name in ("too large", "taken", "failed", "also failed"):
        engine.add(Request(name, prepared()))
    for _ in range(4):  # all, two of them, and one alone, twice
        engine.step()
    handle.remove()
    engine.take("taken")
    ended = engine.fail_all(GenerationFailed("the GPU is gone"))
    assert [event.id for event in ended] == ["failed", "also failed"]
    (counters,) = engine.counters.values()
    assert (counters.added, counters.failed, counters.cancelled) == (4, 3, 1)
    assert (counters.out_of_memory, counters.steps) == (4, 0)


def test_a_preview_that_finds_no_memory_is_left_out_and_nothing_else(tiny_pipeline_float64, prepared, alone):
    def run_out(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8), previewer=run_out)
    engine.add(Request("a", prepared(seed=1), preview_every=2))
    engine.add(Request("b", prepared(seed=2)))
    events, latents = run_to_end(engine)
    assert {type(event) for event in events} == {Admitted, Stepped, Finished}
    assert_same(latents["a"], alone(seed=1))
    assert_same(latents["b"], alone(seed=2))
    (counters,) = engine.counters.values()
    assert (counters.steps, counters.out_of_memory) == (5, 2)


def test_a_step_that_breaks_down_has_changed_nothing_even_for_those_it_would_end(tiny_pipeline_float64, prepared):
    def break_down(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8), previewer=break_down)
    engine.add(Request("at its end", with_trajectory(prepared(seed=1), step_index=4)))
    engine.add(Request("on its way", prepared(seed=2), preview_every=1))
    with pytest.raises(RuntimeError, match="illegal"):
        engine.step()
    assert engine.ids == ["at its end", "on its way"]
    assert engine.look("at its end").step_index == 4
    (counters,) = engine.counters.values()
    assert counters.finished == 0


def test_after_a_step_that_broke_down_the_others_keep_their_own_texts(tiny_pipeline_float64, prepared, alone):
    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=2))
    engine.add(Request("a", prepared(prompt="a red circle"), priority="low"))
    engine.step()
    engine.add(Request("urgent", prepared(prompt="rain in the night"), priority="urgent"))
    handle = fail_above(tiny_pipeline_float64.unet, 0, RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(RuntimeError, match="launch failure"):
        engine.step()
    handle.remove()
    engine.cancel("urgent")
    assert_same(run_to_end(engine)[1]["a"], alone(prompt="a red circle"))


def test_memory_that_runs_out_after_the_network_loses_nothing_either(engine, prepared, alone, monkeypatch):
    tries = []

    def run_out_once(x):
        tries.append(x)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return x.clone()

    monkeypatch.setattr("t2v_core.engine.launched.to_cpu", run_out_once)
    for seed in (1, 2):
        engine.add(Request(str(seed), prepared(seed=seed, sampler="euler_a")))
    events, latents = run_to_end(engine)
    assert not any(isinstance(event, Failed) for event in events)
    for seed in (1, 2):
        assert_same(latents[str(seed)], alone(seed=seed, sampler="euler_a"))


def test_an_engine_without_a_previewer_makes_no_previews(engine, prepared):
    engine.add(Request("a", prepared(), preview_every=1))
    events, _ = run_to_end(engine)
    assert {type(event) for event in events} == {Admitted, Stepped, Finished}


def test_previews_come_only_when_they_are_asked_for(tiny_pipeline_float64, prepared):
    def map_to_gray(latents):
        return torch.zeros(*latents.shape[1:], 3, dtype=torch.uint8)

    engine = Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8), previewer=map_to_gray)
    engine.add(Request("seen", prepared(seed=1, num_inference_steps=7), preview_every=3))
    engine.add(Request("unseen", prepared(seed=2, num_inference_steps=7)))
    events, _ = run_to_end(engine)
    previews = [event for event in events if isinstance(event, Preview)]
    assert [(event.id, event.step_index) for event in previews] == [("seen", 3), ("seen", 6)]
    assert previews[0].frames.shape == (2, 2, 2, 3)
