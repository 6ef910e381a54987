"""What torch says when memory runs out, as an error of ours."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from t2v_core.errors import OutOfMemory

# Those have no error class of their own: the CPU's allocator; and CUDA, its libraries and Triton, which take memory
# past torch's.
_SIGNS = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
)
_WHERE = re.compile(r"\[enforce fail at [^\]]*\][^.]*\. ")  # before what happened
_HOW_MUCH = re.compile(r"Tried to allocate [\d.]+ \w+")


@contextmanager
def out_of_memory_explained(
    remedy: str = "use fewer frames, a smaller size, or half precision",
) -> Iterator[None]:
    """Raise OutOfMemory for whichever of torch's errors means that."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in text for sign in _SIGNS):
            raise
        reason = _WHERE.sub("", text, count=1).partition(". ")[0].strip()
        how_much = _HOW_MUCH.search(text)
        if how_much and how_much[0] not in reason:
            reason += f", t{how_much[0][1:]}"
        raise OutOfMemory(f"{reason}: {remedy}") from error
