"""The released model's full size, once: 1.41 billion parameters from ModelScope's files to diffusers' outputs.

One network is in memory at a time. It takes minutes, 12 GiB of memory and 20 GiB of disk.
"""

import gc
import os
import shutil

import modelscope_checkpoint
import pytest
import torch
from references import diffusers_network, relative_error

from t2v_core.config import GenerationDefaults, ModelConfig
from t2v_core.weights import convert, load_autoencoder, load_text_encoder, load_unet, open_checkpoint

CPU = torch.device("cpu")
NEEDED_MEMORY_BYTES = 14 * 2**30
NEEDED_DISK_BYTES = 20 * 2**30

pytestmark = [pytest.mark.full_size, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ModelScope's files at full size, and beside them their conversion to fp16."""
    folder = tmp_path_factory.mktemp("full_size")
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory_bytes < NEEDED_MEMORY_BYTES or shutil.disk_usage(folder).free < NEEDED_DISK_BYTES:
        pytest.skip("needs 14 GiB of memory and 20 GiB of free disk")
    modelscope_checkpoint.write(folder / "modelscope", modelscope_checkpoint.FULL)
    gc.collect()
    convert(open_checkpoint(folder / "modelscope"), folder / "diffusers", torch.float16)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)
    gc.collect()


def test_its_files_say_what_the_model_is(folder):
    assert open_checkpoint(folder / "modelscope").config == ModelConfig()
    assert open_checkpoint(folder / "diffusers").config == ModelConfig()
    assert GenerationDefaults() == open_checkpoint(folder / "diffusers").config.defaults


@pytest.mark.parametrize("load_network", [load_unet, load_autoencoder, load_text_encoder])
def test_converted_weights_are_the_sources_in_half_precision(folder, load_network):
    source = load_network(open_checkpoint(folder / "modelscope"), CPU, torch.float32).state_dict()
    converted = load_network(open_checkpoint(folder / "diffusers", half=True), CPU, torch.float16).state_dict()
    assert source.keys() == converted.keys()
    assert all(torch.equal(source[name].half(), converted[name]) for name in source)


def test_the_unet_has_every_parameter_and_gives_what_diffusers_gives(folder):
    unet = load_unet(open_checkpoint(folder / "diffusers"), CPU, torch.float32)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 1_411_233_860
    assert len(unet.state_dict()) == 1480
    reference = diffusers_network("UNet3DConditionModel", "unet/config.json", ModelConfig(), unet.state_dict())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 16, 24, generator=generator)
    timesteps, text_embeds = torch.tensor([981.0, 401.0]), torch.randn(2, 77, 1024, generator=generator)
    assert (
        relative_error(unet(latents, timesteps, text_embeds), reference(latents, timesteps, text_embeds).sample) <= 1e-5
    )


def test_the_autoencoder_gives_what_diffusers_gives(folder):
    autoencoder = load_autoencoder(open_checkpoint(folder / "diffusers"), CPU, torch.float32)
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 83_653_863
    reference = diffusers_network("AutoencoderKL", "vae/config.json", ModelConfig(), autoencoder.state_dict())
    latents = torch.randn(4, 2, 16, 24)
    frames = torch.cat(list(autoencoder.decode_chunks(latents)))
    assert relative_error(frames, reference.decode(latents.transpose(0, 1) / 0.18215).sample) <= 1e-5
