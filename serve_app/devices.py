"""The device, the threads and the weights of a replica, from the share of a machine that it was given."""

import os
from collections.abc import Collection
from typing import NamedTuple

import torch

from serve_app.config import Scaling
from t2v_core.pipeline import dtype_of
from t2v_core.weights import Checkpoint, NetworkName, open_checkpoint


class Placed(NamedTuple):
    """A checkpoint, and where and in what its networks are to run."""

    weights: Checkpoint
    device: torch.device
    dtype: torch.dtype


def place(model: str, revision: str | None, config: Scaling, networks: Collection[NetworkName]) -> Placed:
    """On the replica's GPU or, where it was given none, on the CPU with as many threads as it may use.

    Weights are fetched of these networks only, and half the bytes where half precision is enough. Raises what
    `open_checkpoint` raises.
    """
    threads = max(1, round(config.num_cpus)) if config.num_threads is None else config.num_threads
    torch.set_num_threads(threads or os.cpu_count() or 1)
    device = torch.device("cuda" if config.num_gpus else "cpu")
    dtype = dtype_of(config.dtype, device)
    weights = open_checkpoint(model, revision=revision, half=dtype == torch.float16, networks=networks)
    return Placed(weights, device, dtype)
