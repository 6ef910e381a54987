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

All have the same weights, random ones of the released size, and the same inputs. What depends on the prompt alone is
done before, by those that can: ours reads the text once, diffusers' at each step. The error is ||out - reference|| /
||reference||, where the reference is diffusers in float32 without TF32, from the same fp16 weights and inputs.

A GPU slows down as it gets hot, so the systems of a case are timed in turns. First each is built and called, and its
error and memory are taken. Then come several rounds, every second one backwards, in each of which every system has its
share of --repeats: one call that is not timed, and then some between CUDA events, which follow each other without
waiting, as steps do. Median, least and p90 are of all of a system's timed calls.

Memory is the peak in a call of what is allocated, beyond the weights, the inputs and all that other systems hold; of a
graph, the peak of the first call, which captures it, since that much stays taken. The first call has other latents than
the later ones; its time holds compiling or capturing, but what an earlier system of this process has loaded or compiled
is there already. diffusers decodes all frames at once, as its pipeline does, or one by one where torch could not index
them in 32 bits.

The results file keeps a case's measurements as soon as they are made, and the next call on the same kind of machine
with the same file makes those that are missing, in turns with each other: only what one call has measured has had the
same card. Failures are tried again, after the systems that have not been tried. All systems of a case are in memory
until they are timed: one that finds no room fails, its failure says beside which others, and the next call tries it
without those that are done by then. On a CPU, with --tiny, all but graphs and compiling can be tried, in float32.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gpu_device import Device
from gpu_peers import Call, Case, Decode, UNetStep, Work, cases_named, diffusers_version, make_work
from gpu_profile import kernels_of
from gpu_results import CASE_NAMES, SYSTEMS, Figures, Record, Results, draw, error_of, report
from timing import turns
from torch import Tensor

from t2v_core.config import ModelConfig
from t2v_core.weights.random_init import TINY

_WARM_UP_CALLS = 3  # after the first
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


@dataclass(frozen=True, slots=True)
class Ready:
    """A system that works, and all that is known of it but its times."""

    call: Call
    error: float | None
    first_call_s: float
    memory_bytes: int | None


class Bench:
    """Measures what the results lack."""

    def __init__(self, arguments: argparse.Namespace, results: Results) -> None:
        self._arguments, self._results = arguments, results
        self._stop_s = time.monotonic() + arguments.stop_after_s
        self._device = Device(arguments.device)
        self._dtype = torch.float16 if self._device.is_gpu else torch.float32
        self._config = TINY if arguments.tiny else ModelConfig()
        version = diffusers_version()
        self._has_diffusers = version is not None
        self._has_reference = self._has_diffusers and not arguments.no_errors
        if not self._has_diffusers:
            _say("diffusers is not installed (pip install diffusers): it is not measured, and no error is known")
        peer = f"diffusers {version}" if version else "no diffusers"
        kind = f"{str(self._dtype).removeprefix('torch.')}{', tiny' if arguments.tiny else ''}"
        self.machine = f"{self._device}, torch {torch.__version__}, {peer}, {kind}"
        # The reference is exact in float32. Nothing else here is of that type on a GPU.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def measure_case(self, case: Case) -> None:
        """Every system asked for that has no figures yet, in turns. Raises Stopped."""
        systems = self._systems(case)
        known = {
            record.system: record
            for record in self._results.records
            if (record.machine, record.case) == (self.machine, case.name)
        }
        new = [system for system in systems if system not in known]
        failed = [system for system in systems if system in known and known[system].figures is None]
        if not new and not failed:
            return
        self._go_on(case.name)
        work = self._work(case)
        reference = self._reference(work, case) if self._has_reference else None
        for together in (new, failed):  # one that loses the device would always take the others' figures with it
            if together:
                self._go_on(f"{case.name}, {', '.join(together)}")
                self._measure(work, case, together, reference)

    def profile(self, case: Case) -> str:
        """The kernels of our network by their time in all, over a few calls. Raises Stopped."""
        self._go_on(f"{case.name}, profile")
        work = self._work(case)
        with torch.inference_mode():
            call = work.bind("t2v", work.build("t2v"))
            for _ in range(_WARM_UP_CALLS):
                call(work.latents)
            return kernels_of(f"{case.name}, t2v", partial(call, work.latents), self._device)

    def _systems(self, case: Case) -> list[str]:
        """Those asked for that can run here."""
        able = Decode.systems if case.is_decode else UNetStep.systems
        return [
            system
            for system in able
            if system in self._arguments.systems
            and (self._has_diffusers or not system.startswith("diffusers"))
            and (self._device.is_gpu or "+" not in system)
        ]

    def _work(self, case: Case) -> Work:
        return make_work(self._config, case, self._device.torch_device, self._dtype)

    def _reference(self, work: Work, case: Case) -> Tensor | None:
        try:
            # cuDNN's float32 is 5 % off on an H200, at 24 frames of 1024x576.
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
                return work.reference()
        except Exception as error:  # out of memory
            _say(f"{case.name}: no reference, so no error is known: {_first_line(error)}")
            return None

    def _measure(self, work: Work, case: Case, systems: Sequence[str], reference: Tensor | None) -> None:
        """Build and call each, and then time in turns those that work. Raises Stopped."""
        ready: dict[str, Ready] = {}
        for system in systems:
            self._free_for(f"{case.name}, {system}")
            with self._failing_alone(case, system, ready):
                ready[system] = self._ready(work, system, reference)
                _say(f"{case.name}, {system}: ready, first call {ready[system].first_call_s:.1f} s")
        self._free_for(f"{case.name}, timing")
        times_ms: dict[str, list[float]] = {system: [] for system in ready}
        for system, num_calls in turns(list(ready), self._arguments.repeats):
            if system not in ready:  # it failed in an earlier turn
                continue
            with self._failing_alone(case, system, ready):
                times_ms[system] += self._turn_ms(ready[system].call, work.latents, num_calls)
            if system not in ready:
                self._free_for(f"{case.name}, timing")
        for system in ready:
            figures = _figures(ready[system], times_ms[system], case.num_videos)
            self._put(Record(machine=self.machine, case=case.name, system=system, figures=figures))
            _say(
                f"{case.name}, {system}: {figures.median_ms:.2f} ms ({figures.min_ms:.2f} at least, p90 "
                f"{figures.p90_ms:.2f}), error {error_of(figures)}"
            )

    @contextmanager
    def _failing_alone(self, case: Case, system: str, ready: dict[str, Ready]) -> Iterator[None]:
        """A system that fails here is recorded and no more ready; the others, which hold memory as well, go on."""
        try:
            yield
        except Exception as error:  # out of memory, what cannot be compiled
            ready.pop(system, None)
            failure = _first_line(error) + (f" (beside {', '.join(ready)})" if ready else "")
            self._put(Record(machine=self.machine, case=case.name, system=system, failure=failure))
            _say(f"{case.name}, {system}: failed: {failure}")

    def _ready(self, work: Work, system: str, reference: Tensor | None) -> Ready:
        network = work.build(system)
        self._device.free()
        held_bytes = self._device.held_bytes()  # by the system's own weights, and by the others
        with torch.inference_mode():
            call = work.bind(system, network)
            self._device.wait()
            started = time.perf_counter()
            call(work.latents.flip(-1))  # others than later: a graph must not replay what it was captured with
            self._device.wait()
            first_call_s = time.perf_counter() - started
            first_peak_bytes = self._device.take_peak_bytes()
            for _ in range(_WARM_UP_CALLS):
                call(work.latents)
            self._device.take_peak_bytes()
            result = call(work.latents)
            self._device.wait()
            peak_bytes = self._device.take_peak_bytes()
            error = None if reference is None else relative_error(result, reference)
        if system.startswith("t2v+"):  # in graphs
            peak_bytes = max(peak_bytes, first_peak_bytes)
        return Ready(call, error, first_call_s, peak_bytes - held_bytes if self._device.is_gpu else None)

    def _turn_ms(self, call: Call, latents: Tensor, num_calls: int) -> list[float]:
        with torch.inference_mode():
            return self._device.times_ms(partial(call, latents), num_calls)

    def _put(self, record: Record) -> None:
        self._results.put(record, self._arguments.results)

    def _go_on(self, what: str) -> None:
        """Free what is left of the work before. Raises Stopped, before `what`, where the time or the device is gone."""
        if time.monotonic() >= self._stop_s:
            raise Stopped(f"{what}: not started, {self._arguments.stop_after_s:g} s are over")
        torch.compiler.reset()  # also its count of recompilations, which has a limit
        self._free_for(what)

    def _free_for(self, what: str) -> None:
        """Free what nothing holds any more. Raises Stopped, before `what`, where the device is gone."""
        try:
            self._device.free()
        except RuntimeError as error:  # after an illegal access the device answers no more, until the process ends
            raise Stopped(f"{what}: the device is lost: {_first_line(error)}") from error


def relative_error(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference||. Raises ValueError where the shapes differ."""
    if result.shape != reference.shape:
        raise ValueError(f"the result is {tuple(result.shape)}, the reference {tuple(reference.shape)}")
    norm = torch.linalg.vector_norm
    return (norm(result.double() - reference.double()) / norm(reference.double())).item()


def _figures(ready: Ready, times_ms: Sequence[float], num_videos: int) -> Figures:
    median_ms = statistics.median(times_ms)
    return Figures(
        error=ready.error,
        first_call_s=ready.first_call_s,
        min_ms=min(times_ms),
        median_ms=median_ms,
        p90_ms=statistics.quantiles(times_ms, n=10, method="inclusive")[-1],
        video_ms=median_ms / num_videos,
        memory_bytes=ready.memory_bytes,
        repeats=len(times_ms),
    )


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
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of a system in all its turns, 2 or more")
    parser.add_argument("--no-errors", action="store_true", help="without the reference that errors are against")
    parser.add_argument(
        "--stop-after-s", type=float, default=float("inf"), help="begin nothing later; what takes turns is finished"
    )
    parser.add_argument("--profile", action="store_true", help="also print the kernels of t2v by their time")
    parser.add_argument("--plot", type=Path, help="only draw the results file: .png, .svg or .pdf")
    return parser


if __name__ == "__main__":
    main()
