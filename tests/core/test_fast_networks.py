"""What makes the networks fast on a GPU changes nothing but rounding: shown here on the CPU, in float64."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from t2v_core import layers
from t2v_core.autoencoder import Autoencoder
from t2v_core.kernels import plain
from t2v_core.unet3d import UNet3D
from t2v_core.weights.networks import Fusible
from t2v_core.weights.random_init import TINY, randomise

KERNEL_TESTS = Path(__file__).parents[1] / "gpu" / "test_kernels.py"


def network(kind, config):
    return randomise(kind(config), torch.Generator().manual_seed(0)).double().eval().requires_grad_(False)


def fused(original):
    """A copy of which all layers that can be one are."""
    result = copy.deepcopy(original)
    fusible = [module for module in result.modules() if isinstance(module, Fusible)]
    assert fusible
    for module in fusible:
        module.fuse()
    return result


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 13)])
def test_a_fused_unet_predicts_the_same(height, width):
    unet = network(UNet3D, TINY.unet)
    latents = torch.randn(2, 4, 3, height, width, dtype=torch.float64)
    timesteps, text_embeds = torch.tensor([900.0, 3.0]), torch.randn(2, 77, 32, dtype=torch.float64)
    assert_same(fused(unet)(latents, timesteps, text_embeds), unet(latents, timesteps, text_embeds))


def test_a_fused_autoencoder_decodes_the_same():
    autoencoder = network(Autoencoder, TINY.autoencoder)
    latents = torch.randn(5, 4, 6, 7, dtype=torch.float64)
    assert_same(fused(autoencoder).decode_frames(latents), autoencoder.decode_frames(latents))


@pytest.mark.parametrize(("kind", "config"), [(UNet3D, TINY.unet), (Autoencoder, TINY.autoencoder)])
def test_fused_weights_keep_their_names_and_values(kind, config):
    original = network(kind, config)
    weights = original.state_dict()
    of_fused = fused(original).state_dict()
    assert list(of_fused) == list(weights)
    assert all(torch.equal(of_fused[name], tensor) for name, tensor in weights.items())


def test_rows_of_one_video_are_what_they_are_each_alone():
    unet = network(UNet3D, TINY.unet)
    latents = torch.randn(3, 4, 4, 8, 8, dtype=torch.float64)
    timesteps, text_embeds = torch.tensor([900.0, 500.0, 3.0]), torch.randn(5, 77, 32, dtype=torch.float64)
    rows = torch.tensor([0, 1, 2, 0, 2])  # of the second video, only the prompt
    together = unet(latents, timesteps, text_embeds, rows)
    assert_same(together, unet(latents[rows], timesteps[rows], text_embeds))


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_convolutions_over_time_of_unfolded_frames_give_the_same(num_frames, monkeypatch):
    unet = network(UNet3D, TINY.unet)
    latents = torch.randn(2, 4, num_frames, 8, 8, dtype=torch.float64)
    timesteps, text_embeds = torch.tensor([900.0, 3.0]), torch.randn(2, 77, 32, dtype=torch.float64)
    expected = unet(latents, timesteps, text_embeds)
    asked = Mock(return_value=True)
    monkeypatch.setattr(layers, "unfolds_over_time", asked)
    assert_same(unet(latents, timesteps, text_embeds), expected)
    assert asked.call_count > 0


def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton is made for Linux alone")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(KERNEL_TESTS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize(("side", "padding"), [(2, 1), (3, 1), (1, 0)])
def test_a_convolution_of_frames_is_one_of_videos(side, padding):
    x, weight = torch.randn(2, 3, 5, 9, 8).double(), torch.randn(16, 8, side, side).double()
    in_3d = plain._conv_in_3d(x, weight.unsqueeze(2), (0, padding, padding))
    assert_same(in_3d, plain._conv(x, weight, padding))
