"""The layout of ModelScope's own release: one JSON file and three pickles, named as its authors' code names them."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel
from torch import Tensor

from t2v_core.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig
from t2v_core.errors import CheckpointError, CheckpointNotFound
from t2v_core.weights.checkpoint import Checkpoint, NetworkName, TensorReader
from t2v_core.weights.files import read_json, read_tensors

MARKER = "configuration.json"

_FILES: Mapping[NetworkName, str] = {
    "unet": "text2video_pytorch_model.pth",
    "autoencoder": "VQGAN_autoencoder.pth",
    "text_encoder": "open_clip_pytorch_model.bin",
}


def needed_files(names: Sequence[str], half: bool, networks: Collection[NetworkName]) -> list[str]:
    """Of all files in a repository, those that loading these networks reads. This layout has a single precision."""
    weights = [file for network, file in _FILES.items() if network in networks]
    missing = [name for name in weights if name not in names]
    if missing:
        raise CheckpointError(f"{missing[0]} is not in the repository; it is no whole ModelScope checkpoint")
    return [MARKER, *weights]


def open_folder(folder: Path, name: str, half: bool, networks: Collection[NetworkName]) -> Checkpoint:
    """The checkpoint in this folder, with readers of these networks. Raises CheckpointError.

    The sizes of the autoencoder and of the text encoder are written nowhere but in the shapes of their tensors, and
    those are gigabytes: of one that is not among the networks, the released model's are given.
    """
    model = read_json(folder / MARKER, _Configuration).model
    autoencoder_config, text_config = AutoencoderConfig(), TextEncoderConfig()
    readers: dict[NetworkName, TensorReader] = {}
    if "autoencoder" in networks:
        autoencoder = _find(folder, model.model_args.ckpt_autoencoder)
        autoencoder_config = _autoencoder_config(read_tensors(autoencoder))
        readers["autoencoder"] = lambda: _rename(_first_stage(read_tensors(autoencoder)), _autoencoder_name)
    if "text_encoder" in networks:
        text = _find(folder, model.model_args.ckpt_clip)
        text_config = _text_encoder_config(read_tensors(text))
        readers["text_encoder"] = lambda: _text_tower(read_tensors(text), text_config.layers)
    cfg = model.model_cfg
    if not cfg.temporal_attention:
        raise CheckpointError(f"{name}: temporal_attention is off; only models with it are known here")
    if "unet" in networks:
        unet = _find(folder, model.model_args.ckpt_unet)
        readers["unet"] = lambda: _rename(read_tensors(unet), _unet_name)
    return Checkpoint(
        name,
        ModelConfig(
            unet=UNetConfig(
                block_out_channels=tuple(cfg.unet_dim * multiplier for multiplier in cfg.unet_dim_mult),
                attention=tuple(1 / 2**level in cfg.unet_attn_scales for level in range(len(cfg.unet_dim_mult))),
                layers_per_block=cfg.unet_res_blocks,
                attention_head_dim=cfg.unet_head_dim,
                cross_attention_dim=cfg.unet_context_dim,
            ),
            autoencoder=autoencoder_config,
            text_encoder=text_config,
        ),
        readers,
    )


class _ModelArgs(BaseModel):
    ckpt_unet: str
    ckpt_autoencoder: str
    ckpt_clip: str


class _ModelCfg(BaseModel):
    unet_in_dim: Literal[4]
    unet_out_dim: Literal[4]
    unet_dim: int
    unet_dim_mult: tuple[int, ...]
    unet_context_dim: int
    unet_head_dim: int
    unet_res_blocks: int
    unet_attn_scales: tuple[float, ...]
    temporal_attention: bool  # the released file has the string "True"
    num_timesteps: Literal[1000]
    mean_type: Literal["eps"]


class _Model(BaseModel):
    model_args: _ModelArgs
    model_cfg: _ModelCfg


class _Configuration(BaseModel):
    model: _Model


def _find(folder: Path, written: str) -> Path:
    """A file as the configuration names it: relative to the folder, or else by its bare name in the folder."""
    for path in (folder / written, folder / PurePosixPath(written).name):
        if path.is_file():
            return path
    raise CheckpointNotFound(f"{folder / written}: no such file, though {MARKER} names it; fetch the checkpoint again")


def _rename(tensors: dict[str, Tensor], new_name: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors under our names. A 1x1 convolution becomes the linear layer that it is."""
    return {(name := new_name(old)): _without_kernel_of_one(name, tensor) for old, tensor in tensors.items()}


def _without_kernel_of_one(name: str, tensor: Tensor) -> Tensor:
    is_linear_here = re.search(r"\.(proj_in|proj_out|to_q|to_k|to_v|to_out\.0)\.weight$", name)
    return tensor.flatten(1) if is_linear_here and tensor.dim() > 2 else tensor


# What a residual block's, a transformer's and the UNet's own parts are called here and there.
_RESNET_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_TOP_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE_NAMES = {0: "resnets.0", 1: "attentions.0", 2: "temp_attentions.0", 3: "resnets.1"}


def _unet_name(name: str) -> str:
    """Blocks are numbered through there, with a down- or upsampler as every third; here by resolution."""
    for theirs, ours in _UNET_TOP_NAMES.items():
        if name.startswith(f"{theirs}."):
            return name.replace(theirs, ours, 1)
    if found := re.fullmatch(r"input_blocks\.0\.1\.(.+)", name):
        return f"transformer_in.{found[1]}"
    if found := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        place = _MIDDLE_NAMES.get(int(found[1]), found[1])
        return f"mid_block.{_layer_name(place, found[2])}"
    if found := re.fullmatch(r"input_blocks\.(\d+)\.op\.(.+)", name):
        return f"down_blocks.{(int(found[1]) - 1) // 3}.downsamplers.0.conv.{found[2]}"
    if found := re.fullmatch(r"output_blocks\.(\d+)\.\d\.conv\.(.+)", name):
        return f"up_blocks.{int(found[1]) // 3}.upsamplers.0.conv.{found[2]}"
    if found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([012])\.(.+)", name):
        way, number = ("down", int(found[2]) - 1) if found[1] == "input" else ("up", int(found[2]))
        kind = ("resnets", "attentions", "temp_attentions")[int(found[3])]
        return f"{way}_blocks.{number // 3}.{_layer_name(f'{kind}.{number % 3}', found[4])}"
    return name  # reported as unexpected


def _layer_name(place: str, rest: str) -> str:
    if rest.startswith("temopral_conv."):  # so spelled there
        return place.replace("resnets", "temp_convs") + rest.removeprefix("temopral_conv")
    for theirs, ours in _RESNET_NAMES.items():
        if rest.startswith(f"{theirs}."):
            return f"{place}.{rest.replace(theirs, ours, 1)}"
    return f"{place}.{rest}"


def _first_stage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's part of a whole latent diffusion model."""
    prefix = "first_stage_model."
    found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return found or tensors


_AUTOENCODER_NAMES = {
    r"mid\.block_1\.": "mid_block.resnets.0.",
    r"mid\.block_2\.": "mid_block.resnets.1.",
    r"mid\.attn_1\.norm\.": "mid_block.attentions.0.group_norm.",
    r"mid\.attn_1\.([qkv])\.": r"mid_block.attentions.0.to_\1.",
    r"mid\.attn_1\.proj_out\.": "mid_block.attentions.0.to_out.0.",
    r"norm_out\.": "conv_norm_out.",
    r"nin_shortcut\.": "conv_shortcut.",
    r"down\.(\d)\.block\.(\d)\.": r"down_blocks.\1.resnets.\2.",
    r"down\.(\d)\.downsample\.": r"down_blocks.\1.downsamplers.0.",
}


def _autoencoder_name(name: str) -> str:
    for theirs, ours in _AUTOENCODER_NAMES.items():
        name = re.sub(rf"(?<=\.){theirs}", ours, name)
    # The way up is numbered from fine to coarse there, in the order of its use here.
    if found := re.fullmatch(r"decoder\.up\.(\d)\.(block|upsample)\.(.+)", name):
        place = {"block": "resnets.", "upsample": "upsamplers.0."}[found[2]]
        return f"decoder.up_blocks.{3 - int(found[1])}.{place}{found[3]}"
    return name


def _autoencoder_config(tensors: dict[str, Tensor]) -> AutoencoderConfig:
    tensors = _first_stage(tensors)
    channels: list[int] = []
    layers = 0
    while (first := f"encoder.down.{len(channels)}.block.0.conv1.weight") in tensors:
        channels.append(tensors[first].shape[0])
    while f"encoder.down.0.block.{layers}.conv1.weight" in tensors:
        layers += 1
    if len(channels) != 4:
        raise CheckpointError(f"the autoencoder has {len(channels)} resolutions: this family's has 4; fetch it again")
    return AutoencoderConfig(block_out_channels=tuple(channels), layers_per_block=layers)


def _text_encoder_config(tensors: dict[str, Tensor]) -> TextEncoderConfig:
    try:
        vocab_size, width = tensors["token_embedding.weight"].shape
        context_length = tensors["positional_embedding"].shape[0]
        mlp_width = tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"the text encoder's file lacks {error}; it is no OpenCLIP checkpoint") from error
    layers = len({name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")})
    return TextEncoderConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        width=width,
        heads=width // 64,  # in every OpenCLIP text tower
        layers=layers - 1,  # the last one is not run
        mlp_width=mlp_width,
    )


def _text_tower(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The part of a CLIP model that is run: not its image tower, its last text layer, its projection."""
    tower = {}
    for name, tensor in tensors.items():
        layer = re.match(r"transformer\.resblocks\.(\d+)\.", name)
        is_top = name.startswith(("token_embedding.", "ln_final.")) or name == "positional_embedding"
        if is_top or (layer and int(layer[1]) < layers):
            tower[f"tower.{name}"] = tensor
    return tower
