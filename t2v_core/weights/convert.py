"""Any checkpoint that we read, written in the diffusers layout as safetensors."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
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
    cpu = torch.device("cpu")
    with new_folder(destination) as folder:
        write_config(folder, checkpoint.config)
        write_unet(folder, load_unet(checkpoint, cpu, dtype).state_dict())
        write_autoencoder(folder, load_autoencoder(checkpoint, cpu, dtype).state_dict())
        write_text_encoder(folder, load_text_encoder(checkpoint, cpu, dtype).state_dict())


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill that becomes `destination` at the end, or is gone if anything fails on the way.

    Raises OutputError where the destination exists or cannot be written.
    """
    check_new(destination)
    unfinished: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
        unfinished.chmod(0o755)  # mkdtemp's are private
        yield unfinished
        unfinished.rename(destination)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
        raise _unwritable(destination, error) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def check_new(destination: Path) -> None:
    """Raises OutputError where a folder of this name exists or cannot be told from one that does."""
    try:
        exists = destination.exists()
    except OSError as error:  # too long a name, or a folder that is closed to us
        raise _unwritable(destination, error) from error
    if exists:
        raise OutputError(f"{destination}: already exists; remove it, or choose another folder")


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


def _unwritable(destination: Path, error: Exception) -> OutputError:
    return OutputError(f"{destination}: cannot be written ({error}); free space, or choose another folder")


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
