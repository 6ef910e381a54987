"""Prompt in, frames out: the whole pipeline gives what diffusers' pipelines give from the same checkpoint and seed.

diffusers reads the folder that `convert` writes, so this also proves that folder.
"""

import diffusers
import pytest
import torch
from einops import rearrange
from references import relative_error

from t2v_core.pipeline import load
from t2v_core.weights import convert, open_checkpoint

PROMPT = "A panda eating bamboo on a rock."
NEGATIVE = "blurry, dark"
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "linspace"}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "linspace"}),
}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    convert(open_checkpoint(tiny_checkpoint), folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return load(folder, device="cpu", dtype=torch.float32)


def use_sampler(reference, sampler):
    cls, settings = SCHEDULERS[sampler]
    reference.scheduler = cls.from_config(reference.scheduler.config, **settings)


def assert_same_frames(ours, theirs):
    """uint8 frames: at most 0.1 % of the values may differ, and those by 1."""
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


def denoise(pipeline, params):
    *_, last = pipeline.denoise(params)
    return last.latents


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance_scale"),
    [("ddim", 10, 9.0), ("dpmpp_2m", 10, 9.0), ("euler_a", 8, 6.5), ("ddim", 10, 1.0)],
)
def test_text_to_video_is_that_of_diffusers(folder, pipeline, sampler, steps, guidance_scale):
    reference = diffusers.TextToVideoSDPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    use_sampler(reference, sampler)
    arguments = {
        "negative_prompt": NEGATIVE,
        "height": 72,
        "width": 64,
        "num_frames": 6,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }
    latents, frames = (
        reference(PROMPT, generator=torch.Generator().manual_seed(11), output_type=kind, **arguments).frames
        for kind in ("latent", "pt")
    )
    params = pipeline.params(PROMPT, seed=11, sampler=sampler, **arguments)
    ours = denoise(pipeline, params)
    assert relative_error(ours, latents[0]) <= 1e-5
    assert_same_frames(pipeline.decode(ours), (rearrange(frames[0], "f c h w -> f h w c") * 255).to(torch.uint8))


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_video_to_video_is_that_of_diffusers(folder, pipeline, sampler, tmp_path):
    video = pipeline.generate(PROMPT, seed=1, num_inference_steps=2, num_frames=6).save(tmp_path / "input.mp4")
    params = pipeline.params(
        PROMPT, video=video, seed=11, sampler=sampler, num_inference_steps=10, strength=0.65, guidance_scale=15.0
    )
    assert params.num_steps == 6
    reference = diffusers.VideoToVideoSDPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    use_sampler(reference, sampler)
    latents = reference(
        PROMPT,
        video=[frame.numpy() / 255.0 for frame in params.video],
        strength=0.65,
        num_inference_steps=10,
        guidance_scale=15.0,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
    ).frames
    assert relative_error(denoise(pipeline, params), latents[0]) <= 1e-5
