"""What the trials of kernels share: how they are called, compiled and compared."""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from bench_gpu import relative_error
from bench_kernels import Timer
from torch import Tensor
from triton.runtime.errors import OutOfResources

Outputs = Tensor | tuple[Tensor, ...]
Way = Callable[[], Outputs]

_MOST_PROCESSES = 12
_QUICKEST = 8


def only_checked(doc: str) -> bool:
    """Whether the command line asks for no times."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only that small ones are right, on any device")
    return bool(parser.parse_args().check)


def compile_at_once(compiled: Callable[..., object], choices: Iterable[tuple[Any, ...]]) -> None:
    """Call a function of a module with each of these in processes, which leave what they compile in Triton's cache."""
    num_processes = min(_MOST_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_tried, *zip(*((compiled, *choice) for choice in choices), strict=True)))


def compare(title: str, timer: Timer, known: Mapping[str, Way], tried: Mapping[str, Way], flop: int = 0) -> None:
    """Print what each takes, of those tried the quickest ones, and how far their results are from the first's.

    One that does not fit into a processor is left out.
    """
    reference = next(iter(known.values()))()

    def line(name: str, way: Way) -> tuple[float, str]:
        error, us = error_of(way(), reference), timer.us(way)
        rate = f" {flop / us / 1e6:4.0f} TFLOP/s" if flop else ""
        return us, f"{us:8.1f} us{rate}  {name}  {error:.1e}"

    lines = [line(name, way)[1] for name, way in known.items()]
    found = []
    for name, way in tried.items():
        with suppress(OutOfResources):
            found.append(line(name, way))
    sys.stdout.write("\n".join(["", title, *lines, *(text for _, text in sorted(found)[:_QUICKEST]), ""]))
    sys.stdout.flush()


def check(name: str, found: Outputs, exact: Outputs, tolerance: float) -> None:
    """Raises AssertionError where the error is larger."""
    error = error_of(found, exact)
    sys.stdout.write(f"{name}: {error:.1e}\n")
    assert error < tolerance


def error_of(found: Outputs, exact: Outputs) -> float:
    """The largest one of all outputs."""
    return max(relative_error(one, other) for one, other in zip(_listed(found), _listed(exact), strict=True))


def any_device() -> str:
    """For checks."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tried(compiled: Callable[..., object], *choice: object) -> None:
    with suppress(OutOfResources):
        compiled(*choice)


def _listed(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
