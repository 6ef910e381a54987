"""What the trials of kernels share: how they are compiled and compared."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

from bench_gpu import relative_error
from bench_kernels import Timer
from torch import Tensor
from triton.runtime.errors import OutOfResources

Way = Callable[[], Tensor]

_MOST_PROCESSES = 12
_QUICKEST = 5


def compile_at_once(compiled: Callable[..., object], choices: Iterable[tuple[Any, ...]]) -> None:
    """Call a function of a module with each of these in processes, which leave what they compile in Triton's cache."""
    num_processes = min(_MOST_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_tried, *zip(*((compiled, *choice) for choice in choices), strict=True)))


def compare(
    title: str,
    timer: Timer,
    known: Mapping[str, Way],
    tried: Mapping[str, Way],
    *,
    flop: int = 0,
    moved_bytes: int = 0,
) -> None:
    """Print what each takes, of those tried the quickest ones, and how far their results are from the first's.

    One that does not fit into a processor is left out. flop or moved_bytes: of a call.
    """
    reference = next(iter(known.values()))()

    def line(name: str, way: Way) -> tuple[float, str]:
        error, us = relative_error(way(), reference), timer.us(way)
        rate = f"{flop / us / 1e6:4.0f} TFLOP/s" if flop else f"{moved_bytes / us / 1e3:5.0f} GB/s"
        return us, f"{us:8.1f} us {rate}  {name}  {error:.1e}"

    lines = [line(name, way)[1] for name, way in known.items()]
    found = []
    for name, way in tried.items():
        with suppress(OutOfResources):
            found.append(line(name, way))
    sys.stdout.write("\n".join(["", title, *lines, *(text for _, text in sorted(found)[:_QUICKEST]), ""]))
    sys.stdout.flush()


def _tried(compiled: Callable[..., object], *choice: object) -> None:
    with suppress(OutOfResources):
        compiled(*choice)
