"""The GPU or CPU that `bench_gpu.py` measures on: what it waits for, what memory it has given, and times of calls."""

import gc
from collections.abc import Callable

import torch
from timing import cpu_times_ms, gpu_times_ms


class Device:
    """On a CPU, nothing counts memory: it is always 0."""

    def __init__(self, name: str) -> None:
        self.torch_device = torch.device(name)
        self.is_gpu = self.torch_device.type == "cuda"

    def __str__(self) -> str:
        return (
            torch.cuda.get_device_name(self.torch_device) if self.is_gpu else f"CPU, {torch.get_num_threads()} threads"
        )

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.torch_device)

    def free(self) -> None:
        """What nothing holds any more. Raises RuntimeError where the device is lost."""
        self.wait()
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def held_bytes(self) -> int:
        """What is allocated. The next peak is from here on."""
        if not self.is_gpu:
            return 0
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        return torch.cuda.memory_allocated(self.torch_device)

    def take_peak_bytes(self) -> int:
        """The most that was allocated since the last peak was taken."""
        if not self.is_gpu:
            return 0
        peak_bytes = torch.cuda.max_memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        return peak_bytes

    def times_ms(self, call: Callable[[], object], num_calls: int) -> list[float]:
        """Of calls that follow each other, and one before that is not timed."""
        call()  # not waited for, or the first timed one would hold the launching that the others hide
        return gpu_times_ms(call, num_calls) if self.is_gpu else cpu_times_ms(call, num_calls)
