"""What torch says when memory runs out, as an error of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from t2v_core.errors import OutOfMemory


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Raise OutOfMemory for whichever of torch's errors means that."""
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator has no error class of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).partition(". ")[0].strip()
        raise OutOfMemory(f"{reason}: use fewer frames, a smaller size, or half precision") from error
