"""How a kernel follows the one before it.

A Hopper GPU can place a kernel's programs while the last ones of the kernel before still run ("programmatic dependent
launch"), so that the processors that those leave idle need not wait for the launch as well.
"""

from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl

USUAL: Mapping[str, bool] = {"enable_fp_fusion": True}  # of a kernel that begins when the one before has ended


@cache
def options(device: torch.device) -> Mapping[str, bool]:
    """What every launch is given on a device. Kernels that are launched so call `follow` first."""
    return {**USUAL, "launch_pdl": True} if tl.target_info.cuda_capability_geq(9, 0) else USUAL


@triton.jit
def follow():
    """Let the next kernel come once all programs of this one have, and wait for what the one before has written.

    Nothing is to be read or written before: the kernel before may still write and read there.
    """
    if tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
