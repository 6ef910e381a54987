"""The same model on a GPU. Skipped where there is none; `pytest tests/gpu` runs it on a GPU host."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2v_core.pipeline import load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

PROMPT = "A panda eating bamboo on a rock."
SETTINGS = {"seed": 7, "num_inference_steps": 10, "num_frames": 4}


def psnr(a, b):
    return (10 * torch.log10(255.0**2 / (a.double() - b.double()).square().mean())).item()


@pytest.mark.parametrize(
    ("dtype", "least_psnr"), [(torch.float32, 50.0), (torch.float16, 40.0), (torch.bfloat16, 25.0)]
)
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a"])
def test_a_seed_gives_the_video_that_it_gives_on_the_cpu(tiny_checkpoint, tiny_pipeline, dtype, least_psnr, sampler):
    """float32 is not exact either: torch lets convolutions on a GPU round their inputs to TF32."""
    on_cpu = tiny_pipeline.generate(PROMPT, sampler=sampler, **SETTINGS).frames
    on_gpu = load(tiny_checkpoint, device="cuda", dtype=dtype).generate(PROMPT, sampler=sampler, **SETTINGS).frames
    assert on_gpu.device.type == "cpu"
    assert psnr(on_cpu, on_gpu) >= least_psnr


def test_a_gpu_is_taken_by_itself_and_in_half_precision(tiny_checkpoint):
    pipeline = load(tiny_checkpoint)
    assert (pipeline.device.type, pipeline.dtype) == ("cuda", torch.float16)
    assert pipeline.generate(PROMPT, **SETTINGS).frames.float().std() > 10


def test_attention_over_time_takes_more_pixels_than_a_kernels_grid():
    """One batch entry a pixel: a large video has more than the 65,535 that flash attention's grid takes."""
    q = torch.randn(70_000, 1, 4, 64, device="cuda", dtype=torch.float16)
    attended = F.scaled_dot_product_attention(q, q, q)
    with sdpa_kernel(SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(q[-8:].float(), q[-8:].float(), q[-8:].float())
    torch.testing.assert_close(attended[-8:].float(), plain, rtol=0, atol=5e-3)
