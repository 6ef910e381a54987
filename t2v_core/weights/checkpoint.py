"""A checkpoint: what it says of itself, and how to read each network's tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from t2v_core.config import ModelConfig
from t2v_core.errors import CheckpointError

NetworkName = Literal["unet", "autoencoder", "text_encoder"]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)
TensorReader = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Understood, but not yet read. There are readers of the networks that it was opened for."""

    name: str
    config: ModelConfig
    readers: Mapping[NetworkName, TensorReader]

    def read(self, network: NetworkName) -> dict[str, Tensor]:
        """A network's memory-mapped tensors under our module's names. Raises CheckpointError."""
        if network not in self.readers:
            opened = ", ".join(self.readers) or "its configuration"
            raise CheckpointError(f"{self.name}: opened for {opened} only; name {network} where it is opened")
        return self.readers[network]()
