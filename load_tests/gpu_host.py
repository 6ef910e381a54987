r"""All that is measured on a machine with GPUs, one part after the other: what docs/performance.md says, made again.

    python load_tests/gpu_host.py build/figures
    python load_tests/gpu_host.py build/figures --parts network engine --stop-after-s 580
    python load_tests/gpu_host.py build/figures --parts service --modes exact fp8

Parts:

    tests      tests/gpu, in several processes
    tune       tune_*.py: kernels in other tiles, and some that may replace them
    kernels    bench_kernels.py: where the time of our networks goes, beside what the card could do
    network    bench_gpu.py: ours beside diffusers (pip install diffusers)
    pipeline   bench_pipeline.py: a whole video in process, beside diffusers
    engine     bench_engine.py: the engine beside other ways to batch, at 80, 95 and 50 % of capacity, and saturated
    service    bench_service.py: what HTTP costs, single videos and memory; each of --modes on a service of its own
    scaling    videos a second through HTTP, of a denoiser and a decoder on each GPU, and on one

All that a part says is in PART.log of the folder; network.json, engine.json, service.jsonl and scaling.jsonl have its
figures as soon as they are known. Called again, network and engine go on where they stopped. Services have random
weights of full size and their store in memory, so that no disk has a say, and leave their own logs in PART-*.tar.gz.
When the time is over, what runs is stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from gpu_results import CASE_NAMES, SYSTEMS
from programs import ROOT, Programs, TimeIsOver

_MEMORY = Path("/dev/shm")
_LOAD_TESTS = ROOT / "load_tests"
_MODES: Mapping[str, Mapping[str, Any]] = {  # of the denoiser
    "exact": {},
    "fp8": {"precision": "fp8"},
    "cached": {"cached_steps": 1},
    "fp8-cached": {"precision": "fp8", "cached_steps": 1},
    "one": {"max_ongoing": 1, "urgent_reserve": 0},  # one video at a time, in as little memory as may be
}
_ENGINE_JOBS = 120
_VIDEOS = 16  # of a service, for each GPU
_LONGEST_CASE_S = 90  # of network, with compiled kernels
_MOST_PROCESSES = 12
_LAST_LINES = 150


def main() -> None:
    arguments = _parser().parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    programs = Programs(arguments.out.resolve(), arguments.stop_after_s)
    try:
        for part in arguments.parts:
            _PARTS[part](programs, arguments)
    except TimeIsOver:
        sys.stdout.write("the time is over: call again to go on\n")
    finally:
        for part in arguments.parts:
            log = programs.out / f"{part}.log"
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            sys.stdout.write("\n".join(["", f"== {part}", *lines[-_LAST_LINES:], ""]))


def _tests(programs: Programs, arguments: argparse.Namespace) -> None:
    processes = min(_MOST_PROCESSES, os.cpu_count() or 1)
    programs.run("tests", "-m", "pytest", "tests/gpu", "-q", "-n", processes)


def _tune(programs: Programs, arguments: argparse.Namespace) -> None:
    for script in sorted(_LOAD_TESTS.glob("tune_*.py")):
        programs.run("tune", script)


def _kernels(programs: Programs, arguments: argparse.Namespace) -> None:
    programs.run("kernels", _LOAD_TESTS / "bench_kernels.py")


def _network(programs: Programs, arguments: argparse.Namespace) -> None:
    bench, cases = _LOAD_TESTS / "bench_gpu.py", arguments.cases
    # torch.compile takes minutes a case, and our kernels a part of one, on one core: all at once, for caches on disk.
    theirs, ours = ([s for s in arguments.systems if s.startswith(whose)] for whose in ("diffusers+", "t2v+"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for process in [
            stack.enter_context(programs.started("compiling", *_compiling(bench, Path(folder), case, systems)))
            for case in cases
            for systems in (theirs, ours)
            if systems
        ]:
            programs.wait(process)
    stop_s = max(0.0, programs.left_s() - _LONGEST_CASE_S)  # a case that is begun is measured to its end
    what = "--cases", *cases, "--systems", *arguments.systems, "--stop-after-s", stop_s
    programs.run("network", bench, programs.out / "network.json", *what)


def _compiling(bench: Path, folder: Path, case: str, systems: list[str]) -> list[object]:
    """What leaves a case's kernels in caches."""
    results = folder / f"{case}-{systems[0]}"
    return [bench, results, "--cases", case, "--systems", *systems, "--repeats", 2, "--no-errors"]


def _pipeline(programs: Programs, arguments: argparse.Namespace) -> None:
    _write_checkpoint(programs, "pipeline", arguments.checkpoint)
    bench = _LOAD_TESTS / "bench_pipeline.py"
    programs.run("pipeline", bench, arguments.checkpoint, "--device", "cuda", "--dtype", "fp16")


def _engine(programs: Programs, arguments: argparse.Namespace) -> None:
    command = _LOAD_TESTS / "bench_engine.py", programs.out / "engine.json"
    runs = "--loads", 0.8, 2, 0.95, 0.5, "--num-jobs", _ENGINE_JOBS, "--overhead"
    programs.run("engine", *command, *runs, "--stop-after-s", programs.left_s())


def _service(programs: Programs, arguments: argparse.Namespace) -> None:
    for mode in arguments.modes:
        only_http = [] if mode == "exact" else ["--http-only"]
        _try_service(programs, "service", arguments.checkpoint, mode, 1, *only_http)


def _scaling(programs: Programs, arguments: argparse.Namespace) -> None:
    for num_gpus in (torch.cuda.device_count(), 1):
        _try_service(programs, "scaling", arguments.checkpoint, "exact", num_gpus, "--http-only", "--num-singles", 0)


def _try_service(programs: Programs, part: str, *what: Any) -> None:
    """One that does not start leaves the others their turn."""
    try:
        _bench_service(programs, part, *what)
    except RuntimeError as error:
        programs.note(part, str(error))


def _bench_service(programs: Programs, part: str, checkpoint: Path, mode: str, num_gpus: int, *how: object) -> None:
    """A service on so many GPUs, measured and stopped."""
    _write_checkpoint(programs, part, checkpoint)
    with (
        _config_file(checkpoint, mode, num_gpus) as (file, max_ongoing),
        programs.serving(part, file) as url,
    ):
        programs.run(
            part,
            *(_LOAD_TESTS / "bench_service.py", url, "--model", checkpoint, "--num-jobs", _VIDEOS * num_gpus),
            *("--max-ongoing", max_ongoing, "--results", programs.out / f"{part}.jsonl", "--name", file.stem),
            *("--rounds", 2, *how),
        )
        used = ["nvidia-smi", "--query-compute-apps=name,used_memory", "--format=csv,noheader"]
        programs.note(part, subprocess.run(used, capture_output=True, text=True, check=False).stdout)


def _write_checkpoint(programs: Programs, part: str, checkpoint: Path) -> None:
    """Random weights of full size, where there are none yet."""
    if not checkpoint.exists():
        programs.run(part, "-m", "serve_app.cli", "random-checkpoint", checkpoint, "--size", "full", "--dtype", "fp16")
        os.sync()  # or a service would wait for the disk at every commit


@contextmanager
def _config_file(checkpoint: Path, mode: str, num_gpus: int) -> Iterator[tuple[Path, int]]:
    """cluster/serve/gpu.yaml with other weights, store and replicas; and how many videos share a denoiser."""
    args = yaml.safe_load((ROOT / "cluster/serve/gpu.yaml").read_text())["applications"][0]["args"]
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        replicas = {"min_replicas": num_gpus, "max_replicas": num_gpus}
        args["model"] = str(checkpoint)
        args["storage"] = {"database": f"sqlite:///{folder}/jobs.db", "artifacts": f"{folder}/store"}
        args["denoiser"] |= replicas | _MODES[mode] | {"profile": str(checkpoint.parent / f"{mode}.json")}
        args["decoder"] |= replicas | {"max_replicas_per_node": num_gpus}
        file = Path(folder) / f"{mode}-{num_gpus}.yaml"
        file.write_text(json.dumps(args))
        yield file, args["denoiser"]["max_ongoing"]


_PARTS: Mapping[str, Callable[[Programs, argparse.Namespace], None]] = {
    "tests": _tests,
    "tune": _tune,
    "kernels": _kernels,
    "network": _network,
    "pipeline": _pipeline,
    "engine": _engine,
    "service": _service,
    "scaling": _scaling,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder of the results")
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=[part for part in _PARTS if part != "tune"])
    parser.add_argument("--cases", nargs="+", choices=CASE_NAMES, default=list(CASE_NAMES), help="of network")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="of network")
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=list(_MODES), help="of service")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "build/random", help="written if it is not there")
    parser.add_argument("--stop-after-s", type=float, default=float("inf"))
    return parser


if __name__ == "__main__":
    main()
