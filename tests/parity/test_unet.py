"""The UNet gives what diffusers' UNet3DConditionModel gives with the same weights, none of which is zero."""

import pytest
import torch
from references import SMALL_UNET, diffusers_network, random_network, relative_error

from t2v_core.config import ModelConfig
from t2v_core.unet3d import UNet3D

CONFIG = ModelConfig(unet=SMALL_UNET)


@pytest.fixture(scope="module")
def networks():
    ours = random_network(UNet3D, SMALL_UNET)
    return ours, diffusers_network("UNet3DConditionModel", "unet/config.json", CONFIG, ours.state_dict())


@pytest.mark.parametrize(
    ("batch", "num_frames", "height", "width", "num_tokens"),
    [
        (2, 3, 16, 16, 77),
        (1, 16, 8, 8, 77),
        (1, 1, 8, 8, 77),
        (1, 5, 13, 18, 77),  # sides that are odd at some level
        (1, 2, 1, 3, 77),
        (2, 2, 8, 8, 154),  # a prompt of two pieces
        (1, 24, 40, 72, 77),
    ],
)
def test_eps_is_that_of_diffusers(networks, batch, num_frames, height, width, num_tokens):
    ours, reference = networks
    generator = torch.Generator().manual_seed(height)
    latents = torch.randn(batch, 4, num_frames, height, width, generator=generator)
    timesteps = torch.linspace(957.375, 3.0, batch)
    text_embeds = torch.randn(batch, num_tokens, SMALL_UNET.cross_attention_dim, generator=generator)
    eps = ours(latents, timesteps, text_embeds)
    assert eps.shape == latents.shape
    assert relative_error(eps, reference(latents, timesteps, text_embeds).sample) <= 1e-5


def test_the_text_and_the_frame_order_matter(networks):
    ours, _ = networks
    latents = torch.randn(1, 4, 4, 8, 8)
    timesteps = torch.tensor([500.0])
    text_embeds = torch.randn(1, 77, SMALL_UNET.cross_attention_dim)
    eps = ours(latents, timesteps, text_embeds)
    assert relative_error(ours(latents, timesteps, text_embeds.roll(1, -1)), eps) > 1e-2
    assert relative_error(ours(latents.roll(1, 2), timesteps, text_embeds).roll(-1, 2), eps) > 1e-2


def test_rows_of_a_batch_do_not_see_each_other():
    ours = random_network(UNet3D, SMALL_UNET).double()
    latents = torch.randn(3, 4, 4, 8, 8, dtype=torch.float64)
    timesteps = torch.tensor([999.0, 500.0, 1.0])
    text_embeds = torch.randn(3, 77, SMALL_UNET.cross_attention_dim, dtype=torch.float64)
    together = ours(latents, timesteps, text_embeds)
    for row in range(3):
        alone = ours(latents[row, None], timesteps[row, None], text_embeds[row, None])
        torch.testing.assert_close(together[row, None], alone, rtol=1e-10, atol=1e-10)
