"""Copies between a CPU and a GPU that only queue: whoever asks for one need not wait for what the GPU is at."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device and of a type; the same one, where it is that already.

    To a GPU it goes from pinned memory: from any other, torch waits until the copy is made, and so for all work before.
    """
    x = x.to(dtype or x.dtype)
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def to_cpu(x: Tensor) -> Tensor:
    """A copy on the CPU. Of a tensor of a GPU it is there only when the GPU has come so far."""
    return x.to("cpu", non_blocking=True, copy=True)


def fetch(*tensors: Tensor) -> list[Tensor]:
    """Copies on the CPU that are there when this returns: it waits once, for all that was queued before."""
    copies = [to_cpu(tensor) for tensor in tensors]
    if any(tensor.is_cuda for tensor in tensors):
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record()
        done.synchronize()
    return copies
