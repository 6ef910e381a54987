"""Timing on a GPU."""

from collections.abc import Callable
from itertools import pairwise

import torch


def gpu_times_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Of calls that follow each other without waiting, between events on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]
