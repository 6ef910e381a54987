"""Timing of calls on a GPU or a CPU, and whose turn it is where several are timed."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

_ROUNDS = 6  # an even number: each name is as often early in a round as late


def turns(names: Sequence[str], repeats: int) -> Iterator[tuple[str, int]]:
    """Names and how many calls each has in its turn, in rounds: in the end, each has had `repeats`.

    Every second round goes backwards, so that none always has the cooler card.
    """
    rounds = min(_ROUNDS, repeats)
    for number in range(rounds):
        num_calls = repeats * (number + 1) // rounds - repeats * number // rounds
        for name in reversed(names) if number % 2 else names:
            yield name, num_calls


def gpu_times_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Of calls that follow each other without waiting, between events on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def cpu_times_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Of calls that are done when they return."""
    marks_s = [time.perf_counter()]
    for _ in range(repeats):
        call()
        marks_s.append(time.perf_counter())
    return [1000.0 * (after - before) for before, after in pairwise(marks_s)]
