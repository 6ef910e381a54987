"""What there is of a GPU: its processors, and the memory that a program can have of one."""

from functools import cache

import torch

_H100_PROCESSORS, _H100_SHARED_BYTES = 132, 227 << 10


@cache
def num_processors(device: torch.device) -> int:
    """As many as an H100's off a GPU, where kernels are interpreted or only compiled."""
    if device.type != "cuda":
        return _H100_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_bytes(device: torch.device) -> int:
    """What a program can have of a processor's memory: of an H100's off a GPU."""
    if device.type != "cuda":
        return _H100_SHARED_BYTES
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)
