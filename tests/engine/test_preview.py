"""Previews show what the finished video will show, for a part of its decoder's work."""

import random

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from t2v_core.demo.drawing import draw_scenes
from t2v_core.demo.scenes import held_out_scenes
from t2v_core.engine import Engine, FewFrames, LatentsToRGB, Preview, Request, RowBudgets
from t2v_core.pipeline import load


@pytest.fixture(scope="module")
def demo_pipeline():
    return load("demo", device="cpu", dtype=torch.float32)


def test_a_preview_is_some_frames_of_what_the_decoder_makes_of_the_request_then(demo_pipeline):
    params = demo_pipeline.params("A red circle on a white background.", seed=7, num_inference_steps=8, num_frames=6)
    engine = Engine(demo_pipeline.unet, RowBudgets(), previewer=FewFrames(demo_pipeline.autoencoder, num_frames=3))
    engine.add(Request("a", demo_pipeline.prepare(params), preview_every=4))
    events = [event for _ in range(4) for event in engine.step()]
    (preview,) = (event for event in events if isinstance(event, Preview))
    assert preview.step_index == 4
    decoded = demo_pipeline.decode(engine.look("a").x0)[[0, 2, 5]]
    assert preview.frames.shape == decoded.shape
    assert (preview.frames.int() - decoded.int()).abs().max() <= 1


@torch.no_grad()
def test_a_preview_of_one_frame_is_the_middle_of_the_video(tiny_pipeline):
    latents = torch.randn(4, 5, 8, 8)
    (one,) = FewFrames(tiny_pipeline.autoencoder, num_frames=1)(latents)
    differences = (FewFrames(tiny_pipeline.autoencoder, num_frames=5)(latents).int() - one.int()).abs()
    assert differences[2].max() <= 1  # rounding
    assert differences.flatten(1).max(dim=1).values.argmin() == 2


def test_the_linear_map_explains_most_of_the_colours_of_a_model_it_is_fitted_to(demo_pipeline):
    """The demo's latents are less linear in colours than those of models trained on photographs."""
    frames = draw_scenes(held_out_scenes(12), random.Random(0))[:, ::5]
    pixels = rearrange(frames.float() / 127.5 - 1, "v f h w c -> 1 c (v f) h w")
    latents = demo_pipeline.autoencoder.encode(pixels).mean[0]
    preview = LatentsToRGB.fit(demo_pipeline.autoencoder)(latents)
    assert preview.dtype == torch.uint8
    small = F.avg_pool2d(rearrange(frames.float(), "v f h w c -> (v f) c h w"), 8)
    colours = rearrange(small, "f c h w -> f h w c")
    assert preview.shape == colours.shape
    error = (preview.float() - colours).square().mean()
    assert error < 0.45 * (colours - colours.mean(dim=(0, 1, 2))).square().mean()


def test_the_map_is_the_same_each_time(demo_pipeline):
    first, second = (LatentsToRGB.fit(demo_pipeline.autoencoder) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.weight.shape == (3, 4)
