"""Any checkpoint that we read, written in the diffusers layout as safetensors."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from t2v_core.config import ModelConfig
from t2v_core.errors import OutputError
from t2v_core.weights.checkpoint import Checkpoint
from t2v_core.weights.diffusers_config import config_files
from t2v_core.weights.diffusers_layout import text_tower_to_clip, tokenizer_files
from t2v_core.weights.networks import load_autoencoder, load_text_encoder, load_unet


def convert(checkpoint: Checkpoint, destination: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint to a new folder, which diffusers reads as its own. At most one network is in memory.

    Raises CheckpointError as loading does, OutputError where the folder exists or cannot be written; then nothing
    is left of it.
    """
    if destination.exists():
        raise OutputError(f"{destination}: already exists; remove it, or choose another folder")
    cpu = torch.device("cpu")
    unfinished = destination.with_name(destination.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        write_config(unfinished, checkpoint.config)
        write_unet(unfinished, load_unet(checkpoint, cpu, dtype).state_dict())
        write_autoencoder(unfinished, load_autoencoder(checkpoint, cpu, dtype).state_dict())
        write_text_encoder(unfinished, load_text_encoder(checkpoint, cpu, dtype).state_dict())
        unfinished.rename(destination)
    except OSError as error:
        raise OutputError(f"{destination}: {error.strerror or error}; free space, or choose another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_config(folder: Path, config: ModelConfig) -> None:
    """The JSON files of a checkpoint and, for diffusers, its tokenizer."""
    files = config_files(config) | tokenizer_files(config.text_encoder.context_length)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")


def write_unet(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """A denoiser's weights, by our names."""
    _write(folder / "unet" / "diffusion_pytorch_model.safetensors", tensors)


def write_autoencoder(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """An autoencoder's weights, by our names."""
    _write(folder / "vae" / "diffusion_pytorch_model.safetensors", tensors)


def write_text_encoder(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """A text encoder's weights, by our names; the file carries CLIPTextModel's."""
    _write(folder / "text_encoder" / "model.safetensors", text_tower_to_clip(dict(tensors)))


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
