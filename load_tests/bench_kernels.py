r"""Where the time of a step or a decode goes: every operation by its sizes, beside what the card could do.

    python load_tests/bench_kernels.py
    python load_tests/bench_kernels.py --cases 8 --fp8
    python load_tests/bench_kernels.py --device cpu --tiny

An operation is timed alone, when the network first calls it with its sizes: on a GPU in a graph of many calls, with
the same inputs, so that what is smaller than the cache comes from there. The limit is what a product of 8192 x 8192
matrices or a copy of a gigabyte reaches on the same card, by whichever an operation needs longer; memory is counted as
if everything were read and written once. Attention is also timed by each of the libraries that torch can call.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_peers import Case, cases_named, make_work
from gpu_results import CASE_NAMES
from timing import gpu_times_ms
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from t2v_core.config import ModelConfig
from t2v_core.weights.random_init import TINY

_CALLS, _REPLAYS = 20, 5  # of an operation in a graph, of that graph
_SQUARE, _COPIED_VALUES = 8192, 2**29
_NO_WORK = ("empty", "new_empty", "_unsafe_view", "fill_")  # what is filled is a state of the graphs that time
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def main() -> None:
    arguments = _parser().parse_args()
    device = torch.device(arguments.device)
    timer = Timer(device)
    card = Card.measured(timer, device) if device.type == "cuda" else None
    for case in cases_named(arguments.cases, tiny=arguments.tiny):
        operations, attentions = _operations(case, timer, arguments)
        sys.stdout.write(_table(case, operations, card, arguments.lines) + "\n")
        for shapes, of_backends in attentions.items():
            sys.stdout.write(f"attention of {shapes}, us: {of_backends}\n")
        sys.stdout.flush()


@dataclass(slots=True)
class Operation:
    """One with its sizes: what a call takes and needs, and how many there are."""

    name: str
    sizes: str
    us: float
    num_bytes: int
    flop: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class Card:
    """What it reaches at its best."""

    flop_s: float
    bytes_s: float

    @classmethod
    def measured(cls, timer: "Timer", device: torch.device) -> "Card":
        one = torch.randn(_SQUARE, _SQUARE, device=device, dtype=torch.float16)
        values = torch.empty(_COPIED_VALUES, device=device, dtype=torch.float16)
        product_us = timer.us(partial(torch.mm, one, one))
        copy_us = timer.us(partial(values.copy_, torch.zeros_like(values)))
        return cls(2e6 * _SQUARE**3 / product_us, 2e6 * values.nbytes / copy_us)

    def us(self, operation: Operation) -> float:
        """The least that an operation could take."""
        return 1e6 * max(operation.flop / self.flop_s, operation.num_bytes / self.bytes_s)


class Timer:
    """Times calls that can be repeated."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
            self._graph: torch.cuda.CUDAGraph | None = None  # the last one, which keeps the pool alive

    def us(self, call: Callable[[], object]) -> float:
        """Microseconds of one call: the median of several."""
        if not self._on_gpu:
            started = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - started)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            call()
            graph.capture_begin(pool=self._pool)
            for _ in range(_CALLS):
                call()
            graph.capture_end()
            graph.replay()
            times_ms = gpu_times_ms(graph.replay, _REPLAYS)
        self._graph = graph
        return 1000.0 * statistics.median(times_ms) / _CALLS


class Recorder(TorchDispatchMode):
    """Times each operation when it comes the first time, and counts the others. Triton's kernels as well."""

    def __init__(self, timer: Timer) -> None:
        super().__init__()
        self._timer = timer
        self.operations: dict[tuple[str, str], Operation] = {}
        self.attentions: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        is_view = any(given.alias_info for given in func._schema.returns) and not func._schema.is_mutable
        if is_view or name.startswith(_NO_WORK):
            return result
        tensors = _tensors([*args, *kwargs.values()])
        outs = _tensors(result if isinstance(result, (list, tuple)) else [result])
        count_flop = flop_registry.get(func.overloadpacket)
        flop = 0 if count_flop is None else count_flop(*args, **kwargs, out_val=result)
        sizes = _sizes(tensors)
        if "scaled_dot_product" in name:
            self.attentions.setdefault(sizes, (tensors[0], tensors[1], tensors[2]))
        self._note(name, sizes, partial(func, *args, **kwargs), [*tensors, *outs], flop)
        return result

    @contextmanager
    def triton(self) -> Iterator[None]:
        """Its launches are seen, where it is installed."""
        try:
            from triton.runtime.jit import JITFunction
        except ImportError:
            yield
            return
        run = JITFunction.run

        def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            launch = partial(run, kernel, *args, grid=grid, warmup=warmup, **options)
            result = launch()
            given = dict(zip(kernel.arg_names, args, strict=False))
            if not (options.get("HAS_SKIP") or options.get("HAS_DELTA")):
                given.pop("second", None)  # something has to be given, and is not read
            tensors = _tensors([getattr(value, "base", value) for value in given.values()])
            flags = [name.lower() for name, value in options.items() if value is True and name.isupper()]
            flop = _flop_of_kernel(kernel.__name__, tensors)
            self._note(kernel.__name__, " ".join([_sizes(tensors), *flags]), launch, tensors, flop)
            return result

        with mock.patch.object(JITFunction, "run", noted):
            yield

    def _note(self, name: str, sizes: str, call: Callable[[], object], tensors: list[Tensor], flop: int) -> None:
        operation = self.operations.get((name, sizes))
        if operation is not None:
            operation.count += 1
            return
        own = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        with _disable_current_modes():  # a graph's replay has operations of its own
            us = self._timer.us(call)
        self.operations[name, sizes] = Operation(name, sizes, us, sum(own.values()), flop)


def _operations(
    case: Case, timer: Timer, arguments: argparse.Namespace
) -> tuple[list[Operation], Mapping[str, Mapping[str, str]]]:
    """Of one call of our network; and what each backend takes for each attention."""
    device = torch.device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    work = make_work(TINY if arguments.tiny else ModelConfig(), case, device, dtype)
    network = work.build("t2v+fp8" if arguments.fp8 and not case.is_decode else "t2v")
    recorder = Recorder(timer)
    with torch.no_grad():
        call = work.bind("t2v", network)
        call(work.latents)  # compiles, and chooses algorithms
        with recorder, recorder.triton():
            call(work.latents)
        attentions = {
            sizes: {backend.name: _attention_us(backend, tensors, timer) for backend in _BACKENDS}
            for sizes, tensors in (recorder.attentions.items() if device.type == "cuda" else ())
        }
    return list(recorder.operations.values()), attentions


def _attention_us(backend: SDPBackend, tensors: tuple[Tensor, Tensor, Tensor], timer: Timer) -> str:
    try:
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(*tensors)
            return f"{timer.us(partial(F.scaled_dot_product_attention, *tensors)):.1f}"
    except RuntimeError:  # no kernel of it for such sizes
        return "-"


def _flop_of_kernel(name: str, tensors: list[Tensor]) -> int:
    """Of those whose time is a product's: their rows by what is left of the weight."""
    if name == "_attend_over_pixels":
        frames, pixels, width = tensors[0].shape
        return 4 * frames * pixels**2 * (width // 3)
    if name == "_product_and_norm":
        x, *weights = tensors[:3]
        return 2 * len(x) * sum(weight.numel() for weight in weights)
    if name not in ("_geglu", "_geglu_that_stays", "_in_turns", "_conv_tile", "_conv_tiles"):
        return 0
    x, weight = tensors[:2]
    return 2 * (x.numel() // x.shape[-1]) * weight.numel()


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _sizes(tensors: list[Tensor]) -> str:
    """Of the largest first ones: enough to tell calls apart."""
    return " ".join("x".join(map(str, tensor.shape)) for tensor in tensors[:2])


def _table(case: Case, operations: list[Operation], card: Card | None, num_lines: int) -> str:
    title = f"{case.name}: {sum(operation.us * operation.count for operation in operations) / 1e3:.2f} ms in all"
    if card is not None:
        least_ms = sum(card.us(operation) * operation.count for operation in operations) / 1e3
        title += f", {least_ms:.2f} at {card.flop_s / 1e12:.0f} TFLOP/s and {card.bytes_s / 1e12:.2f} TB/s"
    lines = [
        title,
        "| operation | sizes | calls | us each | ms | ms over the limit | TFLOP/s | TB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for operation in sorted(operations, key=lambda operation: -operation.us * operation.count)[:num_lines]:
        over_us = 0.0 if card is None else operation.us - card.us(operation)
        lines.append(
            f"| {operation.name} | {operation.sizes} | {operation.count} | {operation.us:.1f} "
            f"| {operation.us * operation.count / 1e3:.2f} | {over_us * operation.count / 1e3:.2f} "
            f"| {operation.flop / operation.us / 1e6:.0f} | {operation.num_bytes / operation.us / 1e6:.2f} |"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and small videos, to try this out")
    parser.add_argument("--cases", nargs="+", choices=CASE_NAMES, default=["1", "8", "decode256"])
    parser.add_argument("--fp8", action="store_true", help="with products after a norm in fp8")
    parser.add_argument("--lines", type=int, default=40, help="of each table, the longest operations first")
    return parser


if __name__ == "__main__":
    main()
