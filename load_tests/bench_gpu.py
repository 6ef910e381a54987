r"""One step of the UNet, with guidance, and one decode on a GPU: ours beside diffusers', in time, memory and error.

    python load_tests/bench_gpu.py build/gpu.json --stop-after-s 480
    python load_tests/bench_gpu.py build/gpu.json --cases 1 --systems t2v t2v+graphs --profile
    python load_tests/bench_gpu.py build/gpu.json --plot build/gpu.png
    python load_tests/bench_gpu.py build/tiny.json --device cpu --tiny

Systems:

    diffusers           UNet3DConditionModel or AutoencoderKL in fp16, launched kernel by kernel
    diffusers+compile   the same under torch.compile, for the very shape; the autoencoder with channels last
    t2v                 t2v_core's network, launched kernel by kernel
    t2v+graphs          the same behind t2v_core.graphs, which replays all but large calls
    t2v+fp8             and with products after a norm in fp8, which is not exact; only the UNet

All have the same weights, random ones of the released size, and the same inputs. Times are medians between CUDA events
of calls that follow each other without waiting, as steps do. What depends on the prompt alone is done before, by those
that can: ours reads the text once, diffusers' at each step. The error is ||out - reference|| / ||reference||, where the
reference is diffusers in float32 without TF32, from the same fp16 weights and inputs.

Memory is the peak in a call of what is allocated, beyond the weights and the inputs; of a graph, the peak of the first
call, which captures it, since that much stays taken. The first call has other latents than the later ones; its time
holds compiling or capturing, but what an earlier system of this process has loaded or compiled is there already.
diffusers decodes all frames at once, as its pipeline does, or one by one where torch could not index them in 32 bits.

The results file keeps every measurement as soon as it is made, and the next call on the same kind of machine with the
same file makes those that are missing; failures are tried again. On a CPU, with --tiny, all but graphs and compiling
can be tried, in float32.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from gpu_peers import Call, Case, Decode, UNetStep, Work, cases_named, diffusers_version, make_work
from gpu_results import CASE_NAMES, SYSTEMS, Figures, Record, Results, draw, error_of, report
from timing import gpu_times_ms
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from t2v_core.config import ModelConfig
from t2v_core.weights.random_init import TINY

_WARM_UP_CALLS = 3  # after the first
_PROFILED_CALLS = 5
_PROFILED_KERNELS, _KERNEL_NAME_WIDTH = 40, 90
_FAILURE_WIDTH = 300


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.plot:
        draw(Results.load(arguments.results)).savefig(arguments.plot, dpi=150)
        return
    # torch.compile would let Triton have a folder of its own from then on, and ours would be compiled again for it.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    results = Results.load(arguments.results) if arguments.results.exists() else Results()
    bench = Bench(arguments, results)
    cases = cases_named(arguments.cases, tiny=arguments.tiny)
    try:
        for case in cases:
            bench.measure_case(case)
        for case in cases if arguments.profile else ():
            sys.stdout.write(bench.profile(case) + "\n\n")
    except Stopped as stopped:
        _say(f"{stopped}; call again to go on")
    finally:
        sys.stdout.write(report(results, bench.machine) + "\n")


class Stopped(Exception):
    """This process can measure no more."""


class Bench:
    """Measures what the results lack."""

    def __init__(self, arguments: argparse.Namespace, results: Results) -> None:
        self._arguments, self._results = arguments, results
        self._stop_s = time.monotonic() + arguments.stop_after_s
        self._device = torch.device(arguments.device)
        self._on_gpu = self._device.type == "cuda"
        self._dtype = torch.float16 if self._on_gpu else torch.float32
        self._config = TINY if arguments.tiny else ModelConfig()
        version = diffusers_version()
        self._has_diffusers = version is not None
        self._has_reference = self._has_diffusers and not arguments.no_errors
        if not self._has_diffusers:
            _say("diffusers is not installed (pip install diffusers): it is not measured, and no error is known")
        name = torch.cuda.get_device_name(self._device) if self._on_gpu else f"CPU, {torch.get_num_threads()} threads"
        peer = f"diffusers {version}" if version else "no diffusers"
        size = ", tiny" if arguments.tiny else ""
        self.machine = f"{name}, torch {torch.__version__}, {peer}, {str(self._dtype).removeprefix('torch.')}{size}"
        # The reference is exact in float32. Nothing else here is of that type on a GPU.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def measure_case(self, case: Case) -> None:
        """Every system asked for that has no figures yet. Raises Stopped."""
        done = {record.key for record in self._results.records if record.figures is not None}
        systems = [name for name in self._systems(case) if (self.machine, case.name, name) not in done]
        if not systems:
            return
        self._go_on(case.name)
        work = make_work(self._config, case, self._device, self._dtype)
        reference = self._reference(work, case) if self._has_reference else None
        for system in systems:
            self._go_on(f"{case.name}, {system}")
            self._results.put(self._record(work, case, system, reference), self._arguments.results)

    def profile(self, case: Case) -> str:
        """The kernels of our network by their time in all, over a few calls. Raises Stopped."""
        self._go_on(f"{case.name}, profile")
        work = make_work(self._config, case, self._device, self._dtype)
        with torch.inference_mode():
            call = work.bind("t2v", work.build("t2v"))
            for _ in range(_WARM_UP_CALLS):
                call(work.latents)
            self._wait()
            with profile(activities=[ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU]) as profiler:
                for _ in range(_PROFILED_CALLS):
                    call(work.latents)
                self._wait()
        averages = profiler.key_averages()
        if self._on_gpu:  # the launching calls are listed as well, as the CPU's
            kernels = [
                (event.self_device_time_total, event.count, event.key)
                for event in averages
                if event.device_type == DeviceType.CUDA and not event.is_user_annotation
            ]
        else:
            kernels = [(event.self_cpu_time_total, event.count, event.key) for event in averages]
        return _kernel_table(f"{case.name}, t2v", kernels)

    def _systems(self, case: Case) -> list[str]:
        """Those asked for that can run here."""
        able = Decode.systems if case.is_decode else UNetStep.systems
        return [
            system
            for system in able
            if system in self._arguments.systems
            and (self._has_diffusers or not system.startswith("diffusers"))
            and (self._on_gpu or "+" not in system)
        ]

    def _reference(self, work: Work, case: Case) -> Tensor | None:
        try:
            with torch.inference_mode():
                return work.reference()
        except Exception as error:  # as in _record
            _say(f"{case.name}: no reference, so no error is known: {_first_line(error)}")
            return None

    def _record(self, work: Work, case: Case, system: str, reference: Tensor | None) -> Record:
        record = partial(Record, machine=self.machine, case=case.name, system=system)
        try:
            figures = self._figures(work, case, system, reference)
        except Exception as error:  # out of memory, what cannot be compiled: the others go on
            _say(f"{case.name}, {system}: failed: {_first_line(error)}")
            return record(failure=_first_line(error))
        _say(
            f"{case.name}, {system}: {figures.median_ms:.2f} ms ({figures.min_ms:.2f} at least, p90 "
            f"{figures.p90_ms:.2f}), error {error_of(figures)}, first call {figures.first_call_s:.1f} s"
        )
        return record(figures=figures)

    def _figures(self, work: Work, case: Case, system: str, reference: Tensor | None) -> Figures:
        network = work.build(system)
        self._free()
        weights_bytes = self._allocated_bytes()
        with torch.inference_mode():
            call = work.bind(system, network)
            self._wait()
            started = time.perf_counter()
            call(work.latents.flip(-1))  # others than later: a graph must not replay what it was captured with
            self._wait()
            first_call_s = time.perf_counter() - started
            first_peak_bytes = self._take_peak_bytes()
            for _ in range(_WARM_UP_CALLS):
                result = call(work.latents)
            error = None if reference is None else relative_error(result, reference)
            del result
            self._wait()
            self._take_peak_bytes()
            times_ms = self._times_ms(call, work.latents)
            peak_bytes = self._take_peak_bytes()
        if system.startswith("t2v+"):  # in graphs
            peak_bytes = max(peak_bytes, first_peak_bytes)
        median_ms = statistics.median(times_ms)
        return Figures(
            error=error,
            first_call_s=first_call_s,
            min_ms=min(times_ms),
            median_ms=median_ms,
            p90_ms=statistics.quantiles(times_ms, n=10, method="inclusive")[-1],
            video_ms=median_ms / case.num_videos,
            memory_bytes=peak_bytes - weights_bytes if self._on_gpu else None,
            repeats=len(times_ms),
        )

    def _times_ms(self, call: Call, latents: Tensor) -> list[float]:
        repeats = self._arguments.repeats
        if not self._on_gpu:
            marks_s = [time.perf_counter()]
            for _ in range(repeats):
                call(latents)
                marks_s.append(time.perf_counter())
            return [1000.0 * (after - before) for before, after in pairwise(marks_s)]
        return gpu_times_ms(partial(call, latents), repeats)

    def _go_on(self, what: str) -> None:
        """Free what is left of the work before. Raises Stopped, before `what`, where the time or the device is gone."""
        if time.monotonic() >= self._stop_s:
            raise Stopped(f"{what}: not started, {self._arguments.stop_after_s:g} s are over")
        try:
            self._free()
        except RuntimeError as error:  # after an illegal access the device answers no more, until the process ends
            raise Stopped(f"{what}: the device is lost: {_first_line(error)}") from error

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    def _free(self) -> None:
        self._wait()
        torch.compiler.reset()  # also its count of recompilations, which has a limit
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()

    def _allocated_bytes(self) -> int:
        if not self._on_gpu:
            return 0
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _take_peak_bytes(self) -> int:
        if not self._on_gpu:
            return 0
        peak_bytes = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak_bytes


def relative_error(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference||. Raises ValueError where the shapes differ."""
    if result.shape != reference.shape:
        raise ValueError(f"the result is {tuple(result.shape)}, the reference {tuple(reference.shape)}")
    norm = torch.linalg.vector_norm
    return (norm(result.double() - reference.double()) / norm(reference.double())).item()


def _kernel_table(title: str, kernels: Sequence[tuple[float, int, str]]) -> str:
    """kernels: microseconds and launches over all profiled calls, and name."""
    total_us, launches = sum(us for us, _, _ in kernels), sum(count for _, count, _ in kernels)
    lines = [
        f"{title}: {total_us / _PROFILED_CALLS / 1000:.3f} ms in {launches / _PROFILED_CALLS:.0f} kernels a call",
        "   ms a call  share  launches  kernel",
    ]
    for us, count, name in sorted(kernels, reverse=True)[:_PROFILED_KERNELS]:
        lines.append(
            f"{us / _PROFILED_CALLS / 1000:12.4f} {us / total_us:6.1%} {count / _PROFILED_CALLS:9.4g}  "
            f"{name[:_KERNEL_NAME_WIDTH]}"
        )
    return "\n".join(lines)


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:_FAILURE_WIDTH].replace("|", "/")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="the results file, .json; goes on with it if it is there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and small videos, to try this out")
    parser.add_argument("--cases", nargs="+", choices=CASE_NAMES, default=CASE_NAMES)
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=SYSTEMS, help="none: only --profile")
    parser.add_argument("--repeats", type=int, default=30, help="of each timed call, 2 or more")
    parser.add_argument("--no-errors", action="store_true", help="without the reference that errors are against")
    parser.add_argument("--stop-after-s", type=float, default=float("inf"), help="start nothing new later")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of t2v by their time")
    parser.add_argument("--plot", type=Path, help="only draw the results file: .png, .svg or .pdf")
    return parser


if __name__ == "__main__":
    main()
