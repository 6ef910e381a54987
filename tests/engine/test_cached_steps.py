"""Steps that reuse what the UNet's coarser resolutions made of the step before them."""

import dataclasses

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from t2v_core.denoising import denoise_step
from t2v_core.engine import Engine, Finished, Request, RowBudgets, warm_up
from t2v_core.engine.profile import Measurement, Profile
from t2v_core.errors import InvalidRequest
from t2v_core.guidance import condition
from t2v_core.pipeline import load
from t2v_core.trajectory import Trajectory

STEPS = 7


@pytest.fixture
def unet(tiny_pipeline_float64):
    return tiny_pipeline_float64.unet


@pytest.fixture
def whole_calls(unet):
    """Which calls of the network computed all resolutions, by their number; and the rows of those."""
    calls, rows = [], []
    handles = [
        unet.time_embedding.register_forward_hook(lambda *_: calls.append(False)),
        unet.mid_block.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0]))),
        unet.mid_block.register_forward_hook(lambda *_: calls.__setitem__(-1, True)),
    ]
    yield calls, rows
    for handle in handles:
        handle.remove()


def run(unet, cached_steps, **requests):
    """What the engine makes of requests that come together."""
    engine = Engine(unet, RowBudgets(unmeasured_rows=16), cached_steps=cached_steps)
    for name, denoising in requests.items():
        engine.add(Request(name, denoising))
    latents = {}
    while len(engine):
        latents |= {event.id: event.trajectory.latents for event in engine.step() if isinstance(event, Finished)}
    return latents


def test_features_of_the_same_step_change_nothing(unet):
    latents, text = torch.randn(2, 4, 3, 6, 7).double(), torch.randn(3, 77, unet.config.cross_attention_dim).double()
    timesteps, rows = torch.tensor([900.0, 3.0]), torch.tensor([0, 1, 0])
    with torch.inference_mode():
        expected = unet(latents, timesteps, text, rows)
        eps, features = unet.predict(latents, timesteps, text, rows)
        again, same = unet.predict(latents, timesteps, text, rows, features)
        other, _ = unet.predict(latents, timesteps, text, rows, features + 1)
    assert len(features) == 3
    assert torch.equal(eps, expected)
    assert same is features
    torch.testing.assert_close(again, expected, rtol=1e-10, atol=1e-10)
    assert (other - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize(("cached_steps", "whole"), [(0, range(STEPS)), (1, (0, 1, 3, 5)), (2, (0, 1, 4)), (9, (0, 1))])
def test_after_the_first_so_many_steps_in_a_row_reuse_features(unet, prepared, whole_calls, cached_steps, whole):
    calls, _ = whole_calls
    run(unet, cached_steps, a=prepared(num_inference_steps=STEPS))
    assert [number for number, is_whole in enumerate(calls) if is_whole] == list(whole)
    assert len(calls) == STEPS


def test_each_request_of_a_batch_gets_its_own_features(unet, prepared):
    requests = {
        "guided": prepared(num_inference_steps=STEPS),
        "plain": prepared(num_inference_steps=STEPS, seed=2, guidance_scale=1.0),
        "other": prepared(num_inference_steps=STEPS, seed=3, prompt="a fox", sampler="euler_a"),
    }
    together = run(unet, 2, **requests)
    exact = run(unet, 0, **requests)
    for name, request in requests.items():
        alone = run(unet, 2, **{name: request})[name]
        torch.testing.assert_close(together[name], alone, rtol=1e-10, atol=1e-10)
        assert 0 < (together[name] - exact[name]).norm() < exact[name].norm()


def test_one_that_joins_lets_all_compute_theirs_anew(unet, prepared, whole_calls):
    calls, rows = whole_calls
    engine = Engine(unet, RowBudgets(unmeasured_rows=16), cached_steps=9, runs_ahead=False)
    engine.add(Request("a", prepared(num_inference_steps=STEPS)))
    for _ in range(3):
        engine.step()
    engine.add(Request("b", prepared(num_inference_steps=STEPS, seed=2)))
    for _ in range(3):
        engine.step()
    assert calls == [True, True, False, True, True, False]
    assert rows == [2, 2, 4, 4]


@pytest.fixture
def features_made(unet):
    """Weak references to the memory of the features of each whole call."""
    made = []
    coarser = unet.up_blocks[-2]
    handle = coarser.register_forward_hook(lambda *called: made.append(StorageWeakRef(called[-1].untyped_storage())))
    yield made
    handle.remove()


def test_one_that_is_set_aside_holds_no_features_of_its_batch_and_makes_its_own_anew(
    unet, prepared, whole_calls, features_made
):
    calls, _ = whole_calls
    engine = Engine(unet, RowBudgets(unmeasured_rows=4), cached_steps=9, runs_ahead=False)
    for seed in (1, 2):
        engine.add(Request(str(seed), prepared(num_inference_steps=STEPS, seed=seed)))
    for _ in range(2):
        engine.step()
    assert not features_made[-1].expired()
    engine.add(Request("urgent", prepared(num_inference_steps=2, seed=3), priority="urgent"))
    of_both = features_made[-1]
    engine.step()
    assert of_both.expired()
    for _ in range(3):
        engine.step()
    assert calls == [True, True, True, False, True, False]


def test_features_make_room_where_memory_runs_out(unet, prepared, whole_calls, features_made):
    calls, _ = whole_calls
    engine = Engine(unet, RowBudgets(unmeasured_rows=4), cached_steps=9, runs_ahead=False)
    engine.add(Request("a", prepared(num_inference_steps=STEPS)))
    for _ in range(2):
        engine.step()
    assert not features_made[-1].expired()

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    handle = unet.time_embedding.register_forward_pre_hook(run_out)
    engine.step()
    handle.remove()
    assert features_made[-1].expired()
    for _ in range(2):
        engine.step()
    assert calls == [True, True, True, False]


def test_a_trajectory_goes_on_elsewhere_without_features(unet, prepared, whole_calls):
    calls, _ = whole_calls
    request = prepared(num_inference_steps=STEPS)
    conditioning = condition(unet, [request.conditioning])
    for _ in range(3):
        (request,) = denoise_step(unet, [request], conditioning, cached_steps=9)
    assert request.features is not None
    moved = Trajectory.from_bytes(request.trajectory.to_bytes())
    moved_request = dataclasses.replace(prepared(num_inference_steps=STEPS), trajectory=moved)
    denoise_step(unet, [request], conditioning, cached_steps=9)
    denoise_step(unet, [moved_request], conditioning, cached_steps=9)
    assert calls == [True, True, False, False, True]


def test_without_them_no_features_are_kept(unet, prepared):
    request = prepared()
    (stepped,) = denoise_step(unet, [request], condition(unet, [request.conditioning]))
    assert stepped.features is None


def test_warming_up_makes_both_kinds_of_call(unet, prepared, whole_calls):
    calls, _ = whole_calls
    shape = prepared().trajectory.shape
    measured = Measurement(shape=shape, rows=2, step_s=1.0, memory_bytes=0)
    profile = Profile(device="", dtype="", measurements=(measured,))
    warm_up(unet, [shape], profile, rows=[2], caches_features=True)
    assert calls == [True, False]


def test_a_pipeline_makes_nearly_the_same_video(tiny_checkpoint, tiny_pipeline):
    settings = {"seed": 3, "num_inference_steps": 8, "num_frames": 3, "width": 32, "height": 32}
    exact = tiny_pipeline.generate("a panda", **settings).frames.float()
    cached = load(tiny_checkpoint, device="cpu", dtype=torch.float32, cached_steps=1).generate("a panda", **settings)
    other = tiny_pipeline.generate("a panda", **{**settings, "seed": 4}).frames.float()
    assert 0 < (cached.frames.float() - exact).square().mean() < 0.25 * (other - exact).square().mean()


def test_too_many_are_an_error(tiny_checkpoint):
    with pytest.raises(InvalidRequest, match="cached_steps 10: must be from 0 to 9"):
        load(tiny_checkpoint, device="cpu", cached_steps=10)
