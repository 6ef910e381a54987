"""A checkpoint in ModelScope's file layout, written by the reference networks themselves with random weights."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy
import open_clip
import torch
from references import modelscope_module
from torch import nn

from t2v_core.weights.random_init import randomise

SMALL = {
    "unet_dim": 64,
    "unet_dim_mult": [1, 2, 2, 3],
    "unet_context_dim": 1024,  # the reference knows no other on the way up
    "unet_head_dim": 32,
    "unet_res_blocks": 2,
    "autoencoder_dim": 32,
    "text": {"width": 1024, "heads": 16, "layers": 3},
}
FULL = {
    "unet_dim": 320,
    "unet_dim_mult": [1, 2, 4, 4],
    "unet_context_dim": 1024,
    "unet_head_dim": 64,
    "unet_res_blocks": 2,
    "autoencoder_dim": 128,
    "text": {"width": 1024, "heads": 16, "layers": 24},
}


def unet(sizes: dict, seed: int = 0) -> nn.Module:
    with torch.device("meta"):
        network = modelscope_module("unet_sd").UNetSD(
            in_dim=4,
            dim=sizes["unet_dim"],
            y_dim=768,
            context_dim=sizes["unet_context_dim"],
            out_dim=4,
            dim_mult=sizes["unet_dim_mult"],
            num_heads=8,
            head_dim=sizes["unet_head_dim"],
            num_res_blocks=sizes["unet_res_blocks"],
            attn_scales=[1, 0.5, 0.25],
            dropout=0.1,
            temporal_attention=True,
        )
    return _random(network, seed)


def autoencoder(sizes: dict, seed: int = 1) -> nn.Module:
    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": sizes["autoencoder_dim"],
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    with torch.device("meta"):
        network = modelscope_module("autoencoder").AutoencoderKL(ddconfig, 4)
    return _random(network, seed)


def clip(sizes: dict, seed: int = 2) -> nn.Module:
    """All of CLIP, with an image tower, as the released file holds it."""
    with torch.device("meta"):
        network = open_clip.model.CLIP(
            embed_dim=64,
            vision_cfg={"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
            text_cfg=sizes["text"],
        )
    return _random(network, seed)


def write(folder: Path, sizes: dict) -> None:
    """The three pickles and their JSON, with the release's quirks: string booleans, a relative path, a training run."""
    folder.mkdir(parents=True)
    torch.save(unet(sizes).state_dict(), folder / "text2video_pytorch_model.pth")
    torch.save(clip(sizes).state_dict(), folder / "open_clip_pytorch_model.bin")
    _save_lightning_checkpoint(autoencoder(sizes), folder.parent / "VQGAN_autoencoder.pth")
    configuration = {
        "framework": "pytorch",
        "task": "text-to-video-synthesis",
        "model": {
            "type": "latent-text-to-video-synthesis",
            "model_args": {
                "ckpt_clip": "open_clip_pytorch_model.bin",
                "ckpt_unet": "text2video_pytorch_model.pth",
                "ckpt_autoencoder": "../VQGAN_autoencoder.pth",
                "max_frames": 16,
                "tiny_gpu": 1,
            },
            "model_cfg": {
                "unet_in_dim": 4,
                "unet_y_dim": 768,
                "unet_out_dim": 4,
                "unet_num_heads": 8,
                "unet_attn_scales": [1, 0.5, 0.25],
                "unet_dropout": 0.1,
                "temporal_attention": "True",
                "num_timesteps": 1000,
                "mean_type": "eps",
                "var_type": "fixed_small",
                "loss_type": "mse",
                **{name: value for name, value in sizes.items() if name.startswith("unet_")},
            },
        },
        "pipeline": {"type": "latent-text-to-video-synthesis"},
    }
    (folder / "configuration.json").write_text(json.dumps(configuration))


def _random(network: nn.Module, seed: int) -> nn.Module:
    buffers = dict(network.named_buffers())
    network = randomise(network.to_empty(device="cpu"), torch.Generator().manual_seed(seed))
    for name, buffer in buffers.items():
        if name == "attn_mask":
            network.attn_mask = torch.full(buffer.shape, float("-inf")).triu(1)
    return network.requires_grad_(False).eval()


def _save_lightning_checkpoint(network: nn.Module, path: Path) -> None:
    """A training run's checkpoint: a whole latent diffusion model, and a callback's state with numpy scalars in it."""
    callback_module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": callback_module.__name__})
    callback_module.ModelCheckpoint = callback
    modules = {
        "pytorch_lightning": ModuleType("pytorch_lightning"),
        "pytorch_lightning.callbacks": ModuleType("pytorch_lightning.callbacks"),
        callback_module.__name__: callback_module,
    }
    state_dict = {f"first_stage_model.{name}": tensor for name, tensor in network.state_dict().items()}
    state_dict["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    state_dict["cond_stage_model.logit_scale"] = torch.tensor(1.0)
    sys.modules.update(modules)
    try:
        torch.save(
            {
                "epoch": 1,
                "global_step": numpy.int64(875_000),
                "state_dict": state_dict,
                "callbacks": {callback: {"monitor": "val/loss", "best_model_score": numpy.float64(0.25)}},
            },
            path,
        )
    finally:
        for name in modules:
            del sys.modules[name]
