"""Kernels in Gluon without a GPU, which has no interpreter of its own: whether what they do is right in any order.

The groups of warps of a program take turns wherever another may come between, by chance (Python's `random`), each at a
speed of its own. What the hardware does in its own time is done as late as it may be: a product reads its factors, and
a copy out its source, when they are waited for; a copy in arrives at some time after it was asked for, and what was
there is gone from then on. A barrier tells only whether its phase is odd or even. So a wait that is missing or for the
wrong phase gives another result, an error, or a program that never ends, which is an error too.

Layouts, registers and time are not looked at. Products are float32's.
"""

import inspect
import itertools
import math
import random
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from triton import language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

_COMPILERS = {"num_warps", "enable_fp_fusion"}  # options that are not the kernel's
_INSTRUCTIONS = {
    "ex2.approx.ftz.f32 $0, $1;": lambda dtype, x: torch.exp2(x),
    "tanh.approx.f32 $0, $1;": lambda dtype, x: torch.tanh(x),
    "mov.b32 $0, {$1, $2};": lambda dtype, low, high: torch.stack([low, high], -1).view(dtype).squeeze(-1),
    "mov.b32 {$0, $1}, $2;": lambda dtypes, x: x.unsqueeze(-1).view(dtypes[0]).unbind(-1),
}
_DTYPES = {gl.float16: torch.float16, gl.bfloat16: torch.bfloat16, gl.float32: torch.float32, gl.int64: torch.int64}


class RaceError(AssertionError):
    """The program waits for ever, or reads or writes what another is not done with."""


def launch(kernel: GluonJITFunction, *args: Any, grid: Sequence[int], warmup: bool = False, **options: Any) -> None:
    """As `JITFunction.run`, in whose place it may be put."""
    names = inspect.signature(kernel.fn).parameters
    assert options.keys() - names.keys() <= _COMPILERS
    constants = {name: value for name, value in options.items() if name in names}
    for ids in itertools.product(*map(range, grid)):
        _Program.current = _Program(ids, tuple(grid))
        _interpreted(kernel)(*map(_argument, args), **constants)


# What a program is made of


@dataclass
class _Party:
    """Who takes turns: a group of warps, or one copy on its way in."""

    run: Callable[[], Any]  # a part, up to where another may come between
    speed: float
    can_go_on: Callable[[], bool] = lambda: True
    products: deque["_Product"] = field(default_factory=deque)
    stores: deque[Callable[[], None]] = field(default_factory=deque)


class _Program:
    current: "_Program"

    def __init__(self, ids: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.ids, self.grid = ids, grid
        self.parties: dict[object, _Party] = {}
        self.unfenced: dict[int, object] = {}  # where was stored, and by whom
        self.copying_speed = _speed()

    def run(self, groups: Iterable[Callable[[], None]]) -> None:
        """All of them to their ends, and what they have asked for."""
        for group in groups:
            worker = greenlet(group)
            self.parties[worker] = _Party(worker.switch, _speed())
        while self.parties:
            ready = {key: party for key, party in self.parties.items() if party.can_go_on()}
            if not ready:
                raise RaceError(f"program {self.ids}: all {len(self.parties)} groups wait for each other")
            (key,) = random.choices(list(ready), [party.speed for party in ready.values()])
            ready[key].run()
            if not isinstance(key, greenlet):
                del self.parties[key]
            elif key.dead:
                if self.parties[key].stores:
                    raise RaceError(f"program {self.ids}: ended before what it writes had been read")
                del self.parties[key]

    @property
    def party(self) -> _Party:
        """Whose turn it is."""
        return self.parties[getcurrent()]


def _speed() -> float:
    return 10 ** random.uniform(-2, 0)


def _pause(can_go_on: Callable[[], bool] = lambda: True) -> None:
    """Let others come between, until it can go on."""
    if getcurrent() in _Program.current.parties:
        _Program.current.party.can_go_on = can_go_on
        getcurrent().parent.switch()
    elif not can_go_on():
        raise RaceError("a program waits for what nobody else will do")


class _Registers(Tensor):
    """Numbers of a group, which are never changed in place."""

    __iadd__, __isub__, __imul__, __itruediv__ = Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__truediv__

    def split(self) -> tuple[Tensor, ...]:
        return self.unbind(-1)


class _Shared:
    """Of a processor's memory. Nothing is in it at first, which is said by NaN."""

    def __init__(self, values: Tensor, layout: object) -> None:
        self.values, self.layout = values, layout

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def index(self, i: int) -> "_Shared":
        assert 0 <= i < len(self.values)
        return _Shared(self.values[i], self.layout)

    def reshape(self, shape: list[int]) -> "_Shared":
        return _Shared(self.values.view(shape), self.layout)

    def permute(self, order: list[int]) -> "_Shared":
        return _Shared(self.values.permute(order), self.layout)

    def slice(self, first: int, length: int) -> "_Shared":
        assert 0 <= first <= first + length <= len(self.values)
        return _Shared(self.values[first : first + length], self.layout)

    def seen_as(self, dtype: torch.dtype, shape: list[int], layout: object) -> "_Shared":
        """From its first number on."""
        assert dtype == self.dtype
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return _Shared(self.values.as_strided(shape, strides), layout)

    def load(self, layout: object) -> Tensor:
        return self.there().clone().as_subclass(_Registers)

    def store(self, values: Tensor) -> None:
        assert (values.shape, values.dtype) == (self.values.shape, self.values.dtype)
        self.values.copy_(values)
        _Program.current.unfenced[self.values.data_ptr()] = getcurrent()

    def there(self) -> Tensor:
        """What is in it."""
        if self.values.isnan().any():
            raise RaceError("what is read has not arrived, or has been written over")
        return self.values

    def fenced(self) -> Tensor:
        """What the hardware sees of it."""
        if self.values.data_ptr() in _Program.current.unfenced:
            raise RaceError("what was stored is read by the hardware without a fence")
        return self.there()


@dataclass
class _Barrier:
    count: int = 0
    phase: int = 0
    arrivals: int = 0
    missing_bytes: int = 0

    def arrive(self) -> None:
        self.arrivals += 1
        assert self.arrivals <= self.count
        self.see()

    def see(self) -> None:
        if self.arrivals == self.count and self.missing_bytes == 0:
            self.phase, self.arrivals = self.phase + 1, 0


@dataclass
class _Barriers:
    barriers: list[_Barrier]

    @property
    def shape(self) -> list[int]:
        return [len(self.barriers), 1]

    def index(self, i: int) -> _Barrier:
        assert 0 <= i < len(self.barriers)
        return self.barriers[i]


class _Boxes:
    """Of a tensor in the GPU's memory."""

    def __init__(self, of: TensorDescriptor) -> None:
        self.values = of.base.as_strided(of.shape, of.strides)
        self.layout, self.dtype = of.layout, of.base.dtype
        size = of.base.element_size() * math.prod(of.block_shape)
        self.block_type = types.SimpleNamespace(shape=list(of.block_shape), nbytes=size)

    def at(self, place: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """What of the tensor is in a box, and where in the box."""
        sizes = list(zip(place, self.block_type.shape, self.values.shape, strict=True))
        inside = [slice(min(max(0, first), whole), max(0, min(first + size, whole))) for first, size, whole in sizes]
        within = tuple(slice(part.start - first, part.stop - first) for part, first in zip(inside, place, strict=True))
        return self.values[tuple(inside)], within


@dataclass
class _Pointer:
    values: Tensor
    offset: int | Tensor = 0

    def __add__(self, offset: int | Tensor) -> "_Pointer":
        return _Pointer(self.values, self.offset + offset)


@dataclass
class _Product:
    """Under way until it is waited for."""

    a: "_Shared | Tensor"
    b: _Shared
    sums: "Tensor | _Product | None"
    result: Tensor | None = None

    def finish(self) -> None:
        a = self.a.fenced() if isinstance(self.a, _Shared) else self.a
        product = (a.float() @ self.b.fenced().float()).as_subclass(_Registers)
        sums = self.sums.result if isinstance(self.sums, _Product) else self.sums
        self.result = product if sums is None else product + sums

    def __getattr__(self, name: str) -> Any:
        raise RaceError(f"{name} of a product that has not been waited for")

    def __mul__(self, factor: Any) -> Any:
        raise RaceError("multiplication of a product that has not been waited for")

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *args: Any) -> Any:
        raise RaceError(f"{function.__name__} of a product that has not been waited for")


def _argument(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return _Boxes(value)
    return _Pointer(value.flatten()) if isinstance(value, Tensor) else value


# Gluon's words


class _Language:
    """`gl` and `tl`: what is not here is Gluon's own, such as layouts, at which nobody looks."""

    float16, bfloat16, float32 = torch.float16, torch.bfloat16, torch.float32
    int32, int64 = torch.int32, torch.int64
    static_range = range

    def __getattr__(self, name: str) -> Any:
        return getattr(gl, name)

    def program_id(self, axis: int) -> int:
        return _Program.current.ids[axis]

    def num_programs(self, axis: int) -> int:
        return _Program.current.grid[axis]

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: object) -> _Shared | _Barriers:
        if dtype == torch.int64:
            return _Barriers([_Barrier() for _ in range(shape[0])])
        return _Shared(torch.full(shape, math.nan, dtype=dtype), layout)

    def warp_specialize(self, groups: list[tuple], num_warps: list[int], num_registers: list[int]) -> None:
        assert len(groups) - 1 == len(num_warps) == len(num_registers)
        _Program.current.run([partial(function, *args) for function, args in groups])

    def load(self, pointer: _Pointer) -> Tensor:
        index = torch.as_tensor(pointer.offset)
        assert index.min() >= 0
        return pointer.values[index].as_subclass(_Registers)

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: object) -> Tensor:
        return torch.zeros(shape, dtype=dtype).as_subclass(_Registers)

    def arange(self, start: int, end: int, layout: object) -> Tensor:
        return torch.arange(start, end).as_subclass(_Registers)

    def inline_asm_elementwise(
        self, asm: str, constraints: str, args: list[Tensor], *, dtype: Any, **options: object
    ) -> Any:
        return _INSTRUCTIONS[asm](dtype, *args)

    def join(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.stack([low, high], -1)

    def convert_layout(self, values: Tensor, layout: object) -> Tensor:
        return values

    expand_dims, sum, max = staticmethod(torch.unsqueeze), staticmethod(torch.sum), staticmethod(torch.amax)
    where, maximum, rsqrt = staticmethod(torch.where), staticmethod(torch.maximum), staticmethod(torch.rsqrt)
    abs = staticmethod(torch.abs)


def _init(barrier: _Barrier, count: int) -> None:
    barrier.count = count


def _expect(barrier: _Barrier, size: int) -> None:
    _pause()
    barrier.missing_bytes += size
    barrier.arrive()


def _arrive(barrier: _Barrier, pred: bool = True) -> None:
    _pause()
    if pred:
        barrier.arrive()


def _wait(barrier: _Barrier, phase: int) -> None:
    assert phase in (0, 1)
    _pause(lambda: barrier.phase & 1 != phase)


def _fetch(boxes: _Boxes, place: list[int], barrier: _Barrier, to: _Shared) -> None:
    assert boxes.block_type.shape == to.shape
    to.values.fill_(math.nan)
    program = _Program.current

    def arrive() -> None:
        source, within = boxes.at(place)
        to.values.zero_()
        to.values[within] = source
        program.unfenced.pop(to.values.data_ptr(), None)
        barrier.missing_bytes -= boxes.block_type.nbytes
        barrier.see()

    program.parties[arrive] = _Party(arrive, program.copying_speed)
    _pause()


def _put(boxes: _Boxes, place: list[int], source: _Shared) -> None:
    assert source.values.numel() == math.prod(boxes.block_type.shape)

    def leave() -> None:
        target, within = boxes.at(place)
        target.copy_(source.fenced().view(boxes.block_type.shape)[within])

    source.fenced()
    _Program.current.party.stores.append(leave)
    _pause()


def _store_wait(pendings: int) -> None:
    _pause()
    stores = _Program.current.party.stores
    while len(stores) > pendings:
        stores.popleft()()


def _fence() -> None:
    unfenced = _Program.current.unfenced
    for place in [place for place, group in unfenced.items() if group == getcurrent()]:
        del unfenced[place]


def _multiply(
    a: _Shared | Tensor, b: _Shared, sums: Tensor | _Product, *, use_acc: bool = True, is_async: bool
) -> _Product:
    assert is_async
    for factor in (a, b):
        if isinstance(factor, _Shared):
            factor.fenced()
    product = _Product(a, b, sums if use_acc else None)
    _Program.current.party.products.append(product)
    _pause()
    return product


def _multiply_wait(num_outstanding: int, deps: list[_Product | Tensor]) -> Any:
    _pause()
    products = _Program.current.party.products
    while len(products) > num_outstanding:
        products.popleft().finish()
    done = [dep.result if isinstance(dep, _Product) and dep.result is not None else dep for dep in deps]
    return done[0] if len(done) == 1 else done


_MODULES = {
    gl: _Language(),
    tl: _Language(),
    hopper.mbarrier: types.SimpleNamespace(
        init=_init, expect=_expect, arrive=_arrive, wait=_wait, MBarrierLayout=hopper.mbarrier.MBarrierLayout
    ),
    hopper.tma: types.SimpleNamespace(store_wait=_store_wait),
}
_FUNCTIONS = {
    hopper.fence_async_shared: _fence,
    hopper.warpgroup_mma: _multiply,
    hopper.warpgroup_mma_wait: _multiply_wait,
    getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared: _fetch,
    getattr(gl.shared_memory_descriptor, "reinterpret", None)
    or gl.shared_memory_descriptor._reinterpret: _Shared.seen_as,
    getattr(hopper.tma, "async_store", None) or hopper.tma.async_copy_shared_to_global: _put,
}


@cache
def _interpreted(kernel: JITFunction) -> Callable[..., Any]:
    """The function, with every word of Gluon's that it uses in its meaning here."""
    function = kernel.fn
    words = {name: _in_our_words(value) for name, value in function.__globals__.items()}
    return types.FunctionType(function.__code__, words, function.__name__, function.__defaults__, function.__closure__)


def _in_our_words(value: Any) -> Any:
    if isinstance(value, types.ModuleType):
        return _MODULES.get(value, value)
    if isinstance(value, JITFunction):
        return lambda *args, **kwargs: _interpreted(value)(*args, **kwargs)
    if isinstance(value, gl.constexpr):
        return value.value
    return _FUNCTIONS.get(value, value) if callable(value) else value
