"""The device, the threads and the weights of a replica, from the share of a machine that it was given."""

import logging
import os
import timeit
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from serve_app.config import Scaling
from t2v_core.pipeline import dtype_of
from t2v_core.weights import Checkpoint, NetworkName, open_checkpoint

logger = logging.getLogger(__name__)

_PROBE = 77, 1024, 4096  # rows, columns in and out of a product
_MUCH_SLOWER = 1.5


class Placed(NamedTuple):
    """A checkpoint, and where and in what its networks are to run."""

    weights: Checkpoint
    device: torch.device
    dtype: torch.dtype


def place(model: str, revision: str | None, config: Scaling, networks: Collection[NetworkName]) -> Placed:
    """On the replica's GPU or, where it was given none, on the CPU with as many threads as it may use.

    Weights are fetched of these networks only, and half the bytes where half precision is enough. On a CPU that is
    slower in half precision, float32 is used instead. Raises what `open_checkpoint` raises.
    """
    threads = max(1, round(config.num_cpus)) if config.num_threads is None else config.num_threads
    torch.set_num_threads(threads or os.cpu_count() or 1)
    device = torch.device("cuda" if config.num_gpus else "cpu")
    dtype = dtype_of(config.dtype, device)
    if device.type == "cpu" and is_slow(dtype):
        logger.warning("%s is slow on this CPU: float32 is used instead", dtype)
        dtype = torch.float32
    weights = open_checkpoint(model, revision=revision, half=dtype == torch.float16, networks=networks)
    return Placed(weights, device, dtype)


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies it slower than float32, for which all have instructions."""
    return dtype != torch.float32 and _product_s(dtype) > _MUCH_SLOWER * _product_s(torch.float32)


def _product_s(dtype: torch.dtype) -> float:
    rows, width, out_width = _PROBE
    multiply = partial(F.linear, torch.ones(rows, width, dtype=dtype), torch.ones(out_width, width, dtype=dtype))
    return min(timeit.repeat(multiply, number=1, repeat=5))
