"""Each stage's replica, without Serve around it, is given its own networks and needs no others."""

import shutil

import pytest
import torch

from serve_app import devices
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


@pytest.mark.parametrize(("half_s", "dtype"), [(0.001, torch.bfloat16), (0.01, torch.float32)], ids=["fast", "slow"])
def test_half_precision_is_not_used_where_a_cpu_is_slower_with_it(tiny_checkpoint, monkeypatch, half_s, dtype):
    monkeypatch.setattr(devices, "_product_s", lambda dtype: half_s if dtype == torch.bfloat16 else 0.002)
    config = TextEncoderConfig(dtype="bf16")
    assert devices.place(str(tiny_checkpoint), None, config, ["text_encoder"]).dtype == dtype


def test_how_long_a_product_takes_is_measured():
    assert not devices.is_slow(torch.float32)
    assert 0 < devices._product_s(torch.bfloat16) < 10
