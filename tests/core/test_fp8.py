"""Products in fp8: what they round, what they leave alone, and how far the result is from the exact one."""

import math

import pytest
import torch

from t2v_core import layers
from t2v_core.errors import InvalidRequest
from t2v_core.kernels.fp8 import FP8, LARGEST, WEIGHT_SCALE, quantised, to_fp8
from t2v_core.pipeline import load
from t2v_core.transformers import Attention, TransformerBlock
from t2v_core.unet3d import UNet3D
from t2v_core.weights import DEMO, load_unet, open_checkpoint
from t2v_core.weights.networks import prepare
from t2v_core.weights.random_init import TINY, randomise

CPU = torch.device("cpu")


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_numbers_keep_four_digits_of_which_one_is_implied():
    x = torch.logspace(-5, 8, 1000, base=2)
    assert ((to_fp8(x).float() - x).abs() / x).max() <= 2**-4
    assert to_fp8(torch.tensor([1e9, -1e9])).float().tolist() == [LARGEST, -LARGEST]
    assert math.isnan(to_fp8(torch.tensor(math.nan)).float())


def test_weights_that_are_too_large_stay_as_they_are():
    weight, other = torch.randn(2, 8, 8) / 8
    rounded, _ = quantised(weight, other)
    assert rounded.dtype == FP8
    assert relative_error(rounded.float() / WEIGHT_SCALE, weight) <= 2**-4
    other[3, 3] = 8.0
    assert quantised(weight, other) == (weight, other)  # the very same


@pytest.mark.parametrize("name", ["ff.net.0.proj", "proj_out", "resnets.0.conv1", "temp_convs.0.conv1", "attn2.to_q"])
def test_a_network_with_one_weight_that_is_too_large_predicts_nearly_the_same(name, monkeypatch):
    # As on a GPU, where norms unfold what a convolution over time reads.
    monkeypatch.setattr(layers, "unfolds_over_time", lambda x, norm, weight: x.dtype == weight.dtype)
    torch.manual_seed(0)
    latents, text = torch.randn(1, 4, 3, 8, 8), torch.randn(2, 5, TINY.unet.cross_attention_dim)
    predictions = []
    for fp8 in (False, True):
        unet = randomise(UNet3D(TINY.unet), torch.Generator().manual_seed(0))
        for layer, module in unet.named_modules():
            if name in layer and hasattr(module, "weight"):
                module.weight.data.flatten()[0] = 8.0
        with torch.inference_mode():
            predictions.append(prepare(unet, fp8=fp8)(latents, torch.tensor([500.0]), text, torch.tensor([0, 0])))
    assert 0 < relative_error(predictions[1], predictions[0]) < 0.2


def test_products_after_a_norm_are_rounded_and_no_others():
    unet = prepare(randomise(UNet3D(TINY.unet), torch.Generator().manual_seed(0)), fp8=True)
    rounded = {name for name, parameter in unet.named_parameters() if parameter.dtype == FP8}
    expected = {name for name, _ in unet.named_parameters() if name.endswith((".conv1.weight", ".conv2.weight"))}
    expected |= {f"{name}.proj.weight" for name, _ in unet.named_modules() if name.endswith("ff.net.0")}
    for name, module in unet.named_modules():
        if "temp_convs" in name and isinstance(module, torch.nn.Conv3d):
            expected.add(f"{name}.weight")
        if isinstance(module, Attention):
            is_of_text = name.endswith("attn2") and ".attentions." in name
            expected |= {f"{name}.{part}.weight" for part in (("to_q",) if is_of_text else ("to_q", "to_k", "to_v"))}
    assert rounded == expected
    assert len([module for module in unet.modules() if isinstance(module, TransformerBlock)]) > 0


@pytest.mark.parametrize("timestep", [950.0, 500.0, 100.0])
def test_the_demo_predicts_nearly_the_same(timestep):
    checkpoint = open_checkpoint(DEMO)
    torch.manual_seed(0)
    width = checkpoint.config.unet.cross_attention_dim
    latents, text = torch.randn(1, 4, 8, 16, 16), torch.randn(2, 77, width)
    rows = torch.tensor([0, 0])
    with torch.inference_mode():
        exact, fp8 = (
            load_unet(checkpoint, CPU, torch.float32, fp8=fp8)(latents, torch.tensor([timestep]), text, rows)
            for fp8 in (False, True)
        )
    assert 1e-4 < relative_error(fp8, exact) < 0.02


def test_a_pipeline_makes_the_same_video_but_for_noise(tiny_checkpoint, tiny_pipeline):
    settings = {"seed": 3, "num_inference_steps": 4, "num_frames": 3, "width": 32, "height": 32}
    fp8 = load(tiny_checkpoint, device="cpu", dtype=torch.float32, precision="fp8").generate("a panda", **settings)
    exact = tiny_pipeline.generate("a panda", **settings)
    error = (fp8.frames.float() - exact.frames.float()).square().mean()
    other = tiny_pipeline.generate("a panda", **{**settings, "seed": 4})
    assert 0 < error < 0.25 * (other.frames.float() - exact.frames.float()).square().mean()


def test_an_unknown_precision_is_an_error(tiny_checkpoint):
    with pytest.raises(InvalidRequest, match="precision fp4: must be one of exact, fp8"):
        load(tiny_checkpoint, device="cpu", precision="fp4")
