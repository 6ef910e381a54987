"""Each stage's replica, without Serve around it, is given its own networks and needs no others."""

import shutil

import pytest

from serve_app.config import DecoderConfig, DenoiserConfig, TextEncoderConfig
from serve_app.decoder import Decoder
from serve_app.denoiser import Denoiser
from serve_app.text_encoder import TextEncoder

UNET, VAE = (f"{folder}/diffusion_pytorch_model.safetensors" for folder in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"


@pytest.mark.parametrize(
    ("stage", "config", "others"),
    [
        (TextEncoder, TextEncoderConfig(dtype="fp32"), [UNET, VAE]),
        (Denoiser, DenoiserConfig(dtype="fp32"), [TEXT]),
        (Decoder, DecoderConfig(dtype="fp32"), [UNET, TEXT]),
    ],
)
def test_a_stage_starts_without_the_weights_that_only_others_run(tiny_checkpoint, tmp_path, stage, config, others):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    for name in others:
        (folder / name).unlink()
    stage(str(folder), None, config)
