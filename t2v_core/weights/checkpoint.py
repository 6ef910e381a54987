"""A checkpoint: what it says of itself, and how to read each network's tensors."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from t2v_core.config import ModelConfig

TensorReader = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Understood, but not yet read. The readers give memory-mapped tensors under our modules' names."""

    name: str
    config: ModelConfig
    read_unet: TensorReader
    read_autoencoder: TensorReader
    read_text_encoder: TensorReader
