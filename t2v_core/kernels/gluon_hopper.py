"""What the kernels in Gluon share, which say themselves which warps of a Hopper processor do what.

Gluon is Triton's language one level below: of what its compiler would arrange, it leaves layouts, copies and barriers
to us. It may still change with Triton, whose versions 3.6 to 3.9 these kernels know.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SHARED_BYTES = 224 << 10  # of a processor, less what barriers need

# Between a box of a tensor and a processor's memory; the second names are those of Triton 3.6.
fetch = tma.async_load if "async_load" in tma.__all__ else tma.async_copy_global_to_shared
put = tma.async_store if "async_store" in tma.__all__ else tma.async_copy_shared_to_global

_Memory = gl.shared_memory_descriptor
_IS_NEWER = gl.constexpr(hasattr(_Memory, "reinterpret"))  # than Triton 3.6
# A part of shared memory cannot be seen as more than it is, since.
seen_as = _Memory.reinterpret if _IS_NEWER.value else _Memory._reinterpret
# Each product has a copy of a factor in registers, since, and there is room for few.
KEEPS_FACTORS = not _IS_NEWER.value

_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def is_half(*tensors: Tensor) -> bool:
    """Whether all are of one type that the kernels are made for."""
    return tensors[0].dtype in _DTYPES and all(tensor.dtype == tensors[0].dtype for tensor in tensors)


def boxes(x: Tensor, *box: int) -> TensorDescriptor:
    """For the copy engine: x by boxes of such a size, with zeros outside."""
    return TensorDescriptor.from_tensor(x, list(box), gl.NVMMASharedLayout.get_default_for(list(box), _DTYPES[x.dtype]))


@gluon.constexpr_function
def sums_of(columns):
    """The layout of what four warps add up: 64 rows at a time."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def fetch_once_free(tensor, place, free, phase, full, box):
    """One box of a tensor to where another was."""
    mbarrier.wait(free, phase)
    mbarrier.expect(full, tensor.block_type.nbytes)
    fetch(tensor, place, full, box)


@gluon.jit
def from_on(memory, FIRST: gl.constexpr, SHAPE: gl.constexpr, layout: gl.constexpr):
    """Shared memory from one of its parts on, seen in another shape."""
    rest = memory.slice(FIRST, memory.shape[0] - FIRST) if _IS_NEWER else memory.index(FIRST)
    return seen_as(rest, memory.dtype, SHAPE, layout)


@gluon.jit
def all_but(pending: gl.constexpr, product):
    """The product, when no more than so many after it are under way."""
    return warpgroup_mma_wait(pending, deps=[product])


@gluon.jit
def barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many, each passed when so many have arrived."""
    allocated = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(allocated.index(i), count=ARRIVALS)
    return allocated
