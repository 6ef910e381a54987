"""What torch says when memory runs out, as an error of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from t2v_core.errors import OutOfMemory

# The CPU's allocator and CUDA's libraries, which take memory past torch's, have no error class of their own.
_SIGNS = ("DefaultCPUAllocator", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Raise OutOfMemory for whichever of torch's errors means that."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        reason = str(error).partition(". ")[0].strip()
        raise OutOfMemory(f"{reason}: use fewer frames, a smaller size, or half precision") from error
