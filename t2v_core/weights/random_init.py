"""A checkpoint of random weights: for tests and benchmarks, where the real ones are not needed or not at hand."""

from pathlib import Path

import torch
from torch import nn

from t2v_core.autoencoder import Autoencoder
from t2v_core.config import AutoencoderConfig, GenerationDefaults, ModelConfig, TextEncoderConfig, UNetConfig
from t2v_core.text_encoder import TextEncoder
from t2v_core.unet3d import UNet3D
from t2v_core.weights.convert import new_folder, write_autoencoder, write_config, write_text_encoder, write_unet

TINY = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=32,
        norm_num_groups=8,  # with 32, the coarsest level would normalise pairs of values, and rounding explode
    ),
    autoencoder=AutoencoderConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8),
    text_encoder=TextEncoderConfig(width=32, heads=2, layers=2, mlp_width=64),
    defaults=GenerationDefaults(width=64, height=64, num_frames=8, num_inference_steps=10),
)


def write_random_checkpoint(
    destination: Path, config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """Write a checkpoint in the diffusers layout to a new folder, one network in memory at a time.

    No weight is zero, as some are at the start of training: each layer takes part in the result. Raises OutputError.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        networks = UNet3D(config.unet), Autoencoder(config.autoencoder), TextEncoder(config.text_encoder)
    with new_folder(destination) as folder:
        write_config(folder, config)
        for network, write in zip(networks, (write_unet, write_autoencoder, write_text_encoder), strict=True):
            write(folder, randomise(network.to_empty(device="cpu"), generator).to(dtype).state_dict())
            network.to("meta")


def randomise(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """Give every parameter random values at which activations neither vanish nor explode. Returns the network."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() < 2:
                centre = 1.0 if name.endswith("weight") else 0.0  # of a norm, or a bias
                parameter.normal_(centre, 0.1, generator=generator)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    return network
