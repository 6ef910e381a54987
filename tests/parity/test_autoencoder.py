"""The autoencoder gives what diffusers' AutoencoderKL gives, in both directions and whatever the chunks."""

import pytest
import torch
from einops import rearrange
from references import SMALL_AUTOENCODER, diffusers_network, random_network, relative_error

from t2v_core.autoencoder import Autoencoder
from t2v_core.config import AutoencoderConfig, ModelConfig

SCALE = SMALL_AUTOENCODER.scaling_factor


@pytest.fixture(scope="module")
def networks():
    ours = random_network(Autoencoder, SMALL_AUTOENCODER)
    config = ModelConfig(autoencoder=SMALL_AUTOENCODER)
    return ours, diffusers_network("AutoencoderKL", "vae/config.json", config, ours.state_dict())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 72), (8, 8)])
def test_the_posterior_is_that_of_diffusers(networks, height, width):
    ours, reference = networks
    video = torch.randn(2, 3, 3, height, width)
    posterior = ours.encode(video)
    theirs = reference.encode(rearrange(video, "b c f h w -> (b f) c h w")).latent_dist
    assert relative_error(rearrange(posterior.mean, "b c f h w -> (b f) c h w"), theirs.mean * SCALE) <= 1e-5
    assert relative_error(rearrange(posterior.std, "b c f h w -> (b f) c h w"), theirs.std * SCALE) <= 1e-5


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9), (1, 1)])
def test_the_frames_are_those_of_diffusers(networks, height, width):
    ours, reference = networks
    latents = torch.randn(4, 3, height, width)
    frames = torch.cat(list(ours.decode_chunks(latents)))
    theirs = reference.decode(rearrange(latents, "c f h w -> f c h w") / SCALE).sample
    assert relative_error(frames, theirs) <= 1e-5


def test_decoding_in_chunks_changes_nothing(networks, monkeypatch):
    ours, _ = networks
    latents = torch.randn(4, 5, 4, 4)
    whole = torch.cat(list(ours.decode_chunks(latents)))
    video = torch.randn(1, 3, 5, 32, 32)
    posterior = ours.encode(video)
    monkeypatch.setattr("t2v_core.autoencoder._MAX_PIXELS_PER_CHUNK", 2 * 32 * 32)
    chunks = list(ours.decode_chunks(latents))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(chunks), whole)
    torch.testing.assert_close(ours.encode(video).mean, posterior.mean)


def test_it_can_do_without_attention():
    config = AutoencoderConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, mid_block_attention=False)
    ours = random_network(Autoencoder, config)
    assert not any("attention" in name for name in ours.state_dict())
    latents = torch.randn(4, 1, 4, 4)
    reference = diffusers_network(
        "AutoencoderKL", "vae/config.json", ModelConfig(autoencoder=config), ours.state_dict()
    )
    frames = torch.cat(list(ours.decode_chunks(latents)))
    assert relative_error(frames, reference.decode(latents.transpose(0, 1) / SCALE).sample) <= 1e-5
