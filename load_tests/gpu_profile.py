"""The kernels of a call by their time, for `bench_gpu.py`."""

from collections.abc import Callable, Sequence

from gpu_device import Device
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_CALLS = 5
_KERNELS, _NAME_WIDTH = 40, 90


def kernels_of(title: str, call: Callable[[], object], device: Device) -> str:
    """A table over a few calls. The call should have been called before."""
    device.wait()
    with profile(activities=[ProfilerActivity.CUDA if device.is_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(_CALLS):
            call()
        device.wait()
    averages = profiler.key_averages()
    if device.is_gpu:  # the launching calls are listed as well, as the CPU's
        kernels = [
            (event.self_device_time_total, event.count, event.key)
            for event in averages
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
    else:
        kernels = [(event.self_cpu_time_total, event.count, event.key) for event in averages]
    return _table(title, kernels)


def _table(title: str, kernels: Sequence[tuple[float, int, str]]) -> str:
    """kernels: microseconds and launches over all profiled calls, and name."""
    total_us, launches = sum(us for us, _, _ in kernels), sum(count for _, count, _ in kernels)
    lines = [
        f"{title}: {total_us / _CALLS / 1000:.3f} ms in {launches / _CALLS:.0f} kernels a call",
        "   ms a call  share  launches  kernel",
    ]
    for us, count, name in sorted(kernels, reverse=True)[:_KERNELS]:
        lines.append(f"{us / _CALLS / 1000:12.4f} {us / total_us:6.1%} {count / _CALLS:9.4g}  {name[:_NAME_WIDTH]}")
    return "\n".join(lines)
