"""How much of its device's memory a replica takes, and how much is left to it."""

from typing import NamedTuple

import torch
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from serve_app.metrics import MEMORY_ALLOCATED, MEMORY_RESERVED, Metrics
from t2v_core.engine import free_memory_bytes

_CPU_SHARE = 0.9  # of what is free: as on a GPU, the rest is for whatever else there is


class GpuMemory(NamedTuple):
    """What this process takes of a GPU, in bytes: by its tensors, and by torch for these and for later ones."""

    allocated: int
    reserved: int


def gpu_memory(device: torch.device) -> GpuMemory | None:
    """None on a CPU."""
    if device.type != "cuda":
        return None
    return GpuMemory(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))


def tell_memory(metrics: Metrics, memory: GpuMemory | None) -> None:
    """Set the gauges; without a GPU there is nothing to tell."""
    if memory is not None:
        metrics.set(MEMORY_ALLOCATED, memory.allocated)
        metrics.set(MEMORY_RESERVED, memory.reserved)


def free_bytes(device: torch.device) -> int:
    """What a request may take: most of what is free on the GPU or, on a CPU, in the machine or its container."""
    of_gpu = free_memory_bytes(device)
    if of_gpu is not None:
        return of_gpu
    return int(_CPU_SHARE * max(0, get_system_memory() - get_used_memory()))  # type: ignore[no-untyped-call]
