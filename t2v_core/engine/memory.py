"""How much memory a call of a network takes beside what is there already: measured, on a GPU or on a CPU."""

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"  # man 5 proc: reset the peak of the resident set


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Call, and tell the most that it took at any moment. 0 where that is not known: on a CPU, outside of Linux.

    On a CPU it is the process that is measured, with whatever else it does meanwhile.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would be taken again unseen
    try:
        before = _resident_bytes("VmRSS")
        _CLEAR.write_text(_CLEAR_PEAK)
    except OSError:
        call()
        return 0
    call()
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), flags=re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
