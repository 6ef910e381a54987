"""What one process does for one request, on a small model of random weights."""

import dataclasses

import pytest
import torch

from t2v_core.config import SAMPLER_NAMES
from t2v_core.denoising import denoise_step
from t2v_core.errors import GenerationFailed, InvalidRequest, OutOfMemory, UnreadableVideo
from t2v_core.guidance import condition
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.pipeline import device_of, load
from t2v_core.trajectory import Trajectory
from t2v_core.weights import load_unet, open_checkpoint

PROMPT = "A panda eating bamboo on a rock."


def latents_of(pipeline, prompt=PROMPT, **settings):
    settings = {"seed": 7, "num_inference_steps": 4, "num_frames": 4} | settings
    *_, last = pipeline.denoise(pipeline.params(prompt, **settings))
    return last.latents


def rows_of_each_call(pipeline, **settings):
    rows = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[3])))
    try:
        latents_of(pipeline, **settings)
    finally:
        handle.remove()
    return rows


def test_three_lines_make_a_video(tiny_pipeline, tmp_path):
    video = tiny_pipeline.generate(PROMPT, seed=7)
    assert video.frames.shape == (8, 64, 64, 3)
    assert video.frames.dtype == torch.uint8
    assert video.frames.float().std() > 10
    assert video.save(tmp_path / "x.mp4").stat().st_size > 1000


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tiny_pipeline):
    settings = {"num_frames": 4, "num_inference_steps": 3}
    first, same, other = (tiny_pipeline.generate(PROMPT, seed=seed, **settings) for seed in (7, 7, 8))
    assert first.encode() == same.encode()
    assert not torch.equal(first.frames, other.frames)


def test_seed_zero_is_a_seed(tiny_pipeline):
    assert torch.equal(latents_of(tiny_pipeline, seed=0), latents_of(tiny_pipeline, seed=0))


def test_prompt_and_negative_prompt_steer_the_video(tiny_pipeline):
    plain = latents_of(tiny_pipeline)
    assert not torch.allclose(latents_of(tiny_pipeline, prompt="A red car."), plain, atol=1e-2)
    assert not torch.allclose(latents_of(tiny_pipeline, negative_prompt="bamboo"), plain, atol=1e-2)


def test_guidance_costs_one_call_of_two_rows_and_none_of_it_one_row(tiny_pipeline):
    assert rows_of_each_call(tiny_pipeline, guidance_scale=9.0) == [2] * 4
    assert rows_of_each_call(tiny_pipeline, guidance_scale=1.0) == [1] * 4
    assert rows_of_each_call(tiny_pipeline, guidance_scale=0.0) == [1] * 4


def test_guidance_of_one_is_the_limit_of_guidance(tiny_pipeline_float64):
    alone, limit = (latents_of(tiny_pipeline_float64, guidance_scale=scale) for scale in (1.0, 1.0 + 1e-12))
    torch.testing.assert_close(alone, limit, rtol=0, atol=1e-8)


def test_all_words_of_a_long_prompt_count(tiny_pipeline):
    words = "a panda eats bamboo " * 40
    assert not torch.allclose(
        latents_of(tiny_pipeline, prompt=words + "at night"),
        latents_of(tiny_pipeline, prompt=words + "by day"),
        atol=1e-4,
    )


def test_a_long_prompt_and_a_short_negative_prompt_go_together(tiny_pipeline):
    assert latents_of(tiny_pipeline, prompt="panda " * 200, negative_prompt="dark").isfinite().all()
    assert latents_of(tiny_pipeline, negative_prompt="dark " * 200).isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_a_request_resumed_at_any_step_ends_as_if_never_stopped(tiny_pipeline, sampler):
    params = tiny_pipeline.params(PROMPT, seed=3, sampler=sampler, num_inference_steps=6, num_frames=4)
    steps = list(tiny_pipeline.denoise(params))
    assert [step.step_index for step in steps] == [1, 2, 3, 4, 5, 6]
    fresh = tiny_pipeline.prepare(params)
    conditioning = condition(tiny_pipeline.unet, [fresh.conditioning])
    for stopped in steps[:-1]:
        request = dataclasses.replace(fresh, trajectory=Trajectory.from_bytes(stopped.to_bytes()))
        while not request.trajectory.is_finished:
            (request,) = denoise_step(tiny_pipeline.unet, [request], conditioning)
        assert torch.equal(request.trajectory.latents, steps[-1].latents)


def test_a_request_that_is_no_longer_wanted_is_dropped_between_steps(tiny_pipeline):
    calls = []
    handle = tiny_pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        for trajectory in tiny_pipeline.denoise(tiny_pipeline.params(PROMPT, num_inference_steps=50, num_frames=2)):
            if trajectory.step_index == 3:
                break
    finally:
        handle.remove()
    assert len(calls) == 3


def test_two_requests_interleaved_do_not_disturb_each_other(tiny_pipeline):
    settings = {"num_inference_steps": 4, "num_frames": 4, "sampler": "euler_a"}
    params = [tiny_pipeline.params(PROMPT, seed=seed, **settings) for seed in (1, 2)]
    *_, together = zip(*(tiny_pipeline.denoise(p) for p in params), strict=True)
    for p, interleaved in zip(params, together, strict=True):
        *_, alone = tiny_pipeline.denoise(p)
        assert torch.equal(interleaved.latents, alone.latents)


@pytest.mark.parametrize(("dtype", "least_psnr"), [(torch.float16, 40.0), (torch.bfloat16, 25.0)])
def test_lower_precision_gives_nearly_the_same_video(tiny_checkpoint, tiny_pipeline, dtype, least_psnr):
    settings = {"seed": 7, "num_inference_steps": 10, "num_frames": 4}
    exact = tiny_pipeline.generate(PROMPT, **settings).frames.double()
    rounded = load(tiny_checkpoint, device="cpu", dtype=dtype).generate(PROMPT, **settings).frames.double()
    psnr = 10 * torch.log10(255.0**2 / (exact - rounded).square().mean())
    assert psnr >= least_psnr


@pytest.mark.parametrize("size", [(8, 8), (72, 40), (200, 56)])
def test_any_multiple_of_eight_is_a_size(tiny_pipeline, size):
    width, height = size
    video = tiny_pipeline.generate(PROMPT, width=width, height=height, num_frames=2, num_inference_steps=2)
    assert video.frames.shape == (2, height, width, 3)


@pytest.fixture
def input_video(tiny_pipeline, tmp_path):
    video = tiny_pipeline.generate(PROMPT, seed=1, num_inference_steps=3, num_frames=6)
    return video.save(tmp_path / "input.mp4")


def test_a_weak_edit_stays_close_to_its_input_and_a_strong_one_does_not(tiny_pipeline, input_video):
    def difference(strength):
        params = tiny_pipeline.params(PROMPT, video=input_video, strength=strength, seed=2, num_inference_steps=50)
        plan = tiny_pipeline.plan(params)
        start = tiny_pipeline.start(params, plan).latents
        x0 = tiny_pipeline.autoencoder.encode(params.video.permute(3, 0, 1, 2)[None] / 127.5 - 1).mean[0]
        return (start - x0).norm() / x0.norm()

    assert difference(0.04) < 0.5 * difference(0.5) < difference(0.98)


def test_an_input_video_decides_the_number_of_frames_unless_asked_otherwise(tiny_pipeline, input_video):
    assert tiny_pipeline.params(PROMPT, video=input_video).num_frames == 6
    assert tiny_pipeline.params(PROMPT, video=input_video, num_frames=4).num_frames == 4
    assert tiny_pipeline.params(PROMPT, video=input_video).strength == 0.6
    with pytest.raises(UnreadableVideo, match="6"):
        tiny_pipeline.params(PROMPT, video=input_video, num_frames=7)


def test_an_input_video_may_be_a_video_or_its_frames(tiny_pipeline):
    video = tiny_pipeline.generate(PROMPT, seed=1, num_inference_steps=2, num_frames=6, width=96)
    for given in (video, video.frames):
        params = tiny_pipeline.params(PROMPT, video=given)
        assert params.shape == (6, 64, 64)
        assert torch.equal(params.video, video.frames[:, :, 16:80])
    with pytest.raises(InvalidRequest, match="6 frames and 7 are needed"):
        tiny_pipeline.params(PROMPT, video=video, num_frames=7)
    with pytest.raises(InvalidRequest, match=r"must be torch\.uint8"):
        tiny_pipeline.params(PROMPT, video=video.frames.float())


@pytest.mark.parametrize(
    ("fps", "seen"), [(None, [0, 1, 2, 3]), (8, [0, 1, 2, 3]), (4, [0, 2]), (12, [0, 0, 1, 2, 2, 3])]
)
def test_an_input_video_is_played_as_fast_as_before(tiny_pipeline, fps, seen):
    made = tiny_pipeline.generate(PROMPT, num_frames=4, num_inference_steps=1, fps=8)
    params = tiny_pipeline.params(PROMPT, video=made, fps=fps)
    assert params.fps == (fps or 8)
    assert torch.equal(params.video, made.frames[seen])


@pytest.mark.parametrize("fps", [0, False, "8", float("nan"), 3_000_000])
def test_a_frame_rate_that_no_video_has_is_an_error(tiny_pipeline, fps):
    made = tiny_pipeline.generate(PROMPT, num_frames=4, num_inference_steps=1, fps=8)
    with pytest.raises(InvalidRequest, match=f"fps {fps!r}: must be "):
        tiny_pipeline.params(PROMPT, video=made, fps=fps)


def test_encoding_an_input_video_in_chunks_changes_nothing(tiny_pipeline, monkeypatch):
    frames = torch.randint(256, (5, 64, 64, 3), dtype=torch.uint8)
    params = tiny_pipeline.params(PROMPT, video=frames, seed=3)
    whole = tiny_pipeline.start(params, tiny_pipeline.plan(params)).latents
    monkeypatch.setattr("t2v_core.autoencoder._MAX_PIXELS_PER_CHUNK", 2 * 64 * 64)
    torch.testing.assert_close(tiny_pipeline.start(params, tiny_pipeline.plan(params)).latents, whole)


def test_a_preview_of_the_predicted_end_is_nearer_to_it_than_the_noisy_latents(tiny_pipeline):
    steps = list(tiny_pipeline.denoise(tiny_pipeline.params(PROMPT, seed=3, num_inference_steps=10)))
    end = steps[-1].latents
    assert (steps[6].x0 - end).norm() < (steps[6].latents - end).norm()


def test_a_request_that_memory_cannot_hold_is_told_what_to_change(tiny_pipeline, monkeypatch):
    def too_much(*_):
        return torch.empty(2**60)

    monkeypatch.setattr(tiny_pipeline.unet, "forward", too_much)
    what = f"tried to allocate {2**62} bytes: use fewer frames, a smaller size, or half precision"
    with pytest.raises(OutOfMemory, match=what):
        tiny_pipeline.generate(PROMPT, num_inference_steps=1, num_frames=1)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 80 GiB"
            ),
            "CUDA out of memory, tried to allocate 20.00 MiB: use",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), "CUDA error: out of memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), r"Triton Error \[CUDA\]: out of memory: use"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "ALLOCATION_FAILED: use"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "cublasCreate`: use"),
    ],
    ids=["torch", "driver", "Triton", "cuDNN", "cuBLAS"],
)
def test_whoever_finds_no_memory_it_is_told_as_that(error, told):
    with pytest.raises(OutOfMemory, match=told), out_of_memory_explained():
        raise error


def test_weights_that_memory_cannot_hold_are_told_what_to_do(tiny_checkpoint, monkeypatch):
    def too_much(*_, **__):
        return torch.empty(2**60)

    monkeypatch.setattr(torch.Tensor, "to", too_much)
    with pytest.raises(OutOfMemory, match="free memory there, use another device, or half precision"):
        load_unet(open_checkpoint(tiny_checkpoint), torch.device("cpu"), torch.float32)


def test_a_text_that_is_too_long_is_named(tiny_pipeline):
    with pytest.raises(InvalidRequest, match=r"negative_prompt has 800 tokens: at most 600") as caught:
        tiny_pipeline.generate(PROMPT, negative_prompt="dark " * 800)
    assert caught.value.param == "negative_prompt"


def test_a_wrong_size_is_found_before_the_input_video_is_read(tiny_pipeline, tmp_path):
    with pytest.raises(InvalidRequest, match="width 100"):
        tiny_pipeline.params(PROMPT, video=tmp_path / "missing.mp4", width=100)


def test_values_that_are_not_finite_are_an_error_and_not_a_black_video(tiny_checkpoint):
    pipeline = load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    pipeline.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(GenerationFailed, match="not finite: use bf16 or fp32"):
        pipeline.generate(PROMPT, num_inference_steps=2, num_frames=2)

    pipeline = load(tiny_checkpoint, device="cpu", dtype=torch.float32)
    pipeline.autoencoder.decoder.conv_out.bias[0] = torch.inf
    with pytest.raises(GenerationFailed, match="not finite"):
        pipeline.generate(PROMPT, num_inference_steps=2, num_frames=2)


def test_the_video_says_what_it_was_made_from(tiny_pipeline):
    metadata = tiny_pipeline.generate(PROMPT, seed=7, num_inference_steps=2, num_frames=2).metadata()
    assert metadata["title"] == PROMPT
    assert metadata["seed"] == "7"
    assert metadata["model"] == tiny_pipeline.name
    assert "AI-generated" in metadata["comment"]
    assert '"sampler": "dpmpp_2m"' in metadata["settings"]


def test_a_gpu_that_is_not_the_processs_first_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(InvalidRequest, match="set CUDA_VISIBLE_DEVICES=1, and use cuda"):
        device_of("cuda:1")
