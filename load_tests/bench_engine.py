r"""The engine beside other ways to share a GPU, over the same Poisson arrivals: latency and throughput (issue 4).

    python load_tests/bench_engine.py build/engine.json --loads 0.8 --overhead --stop-after-s 500
    python load_tests/bench_engine.py build/engine.json --loads 0.8 --seed 1 --systems static static_urgent engine
    python load_tests/bench_engine.py build/engine.json --loads 2 --scenarios identical mixed --systems static engine
    python load_tests/bench_engine.py build/planned.json --simulate --step-scale 1 --num-jobs 5000
    OMP_NUM_THREADS=1 python load_tests/bench_engine.py build/tiny.json --device cpu --dtype fp32 --tiny \
        --num-jobs 6 --scenarios identical urgent --overhead
    python load_tests/plot_engine.py build/engine.json build/engine.png

Systems:

    one             one request at a time
    serve_batch     batches as Ray Serve's `serve.batch` forms them; best size and timeout
    static          batches of one shape and step count, formed when the GPU is free; best cap
    static_urgent   the same, but that urgent requests are first when a batch is formed
    engine          t2v_core.engine.Engine

All use one UNet of the released size with random weights, and `t2v_core.denoising.denoise_step`; requests want dpmpp_2m
and guidance. A load is a share of capacity: the best rate of the scenario's mix that could be sustained, with each step
at the rows where `t2v_core.engine.measure` found the best throughput of its shape. From a load of 2 on, a run shows the
throughput at saturation, as a share of capacity ("capacity used"). The best settings of the others are those with
the least p95 in a long simulated trace, other than the one that is run, with the step times that were measured.
Systems that do not know of priorities do the same in "mixed" and "urgent", and are run once for both.

The results file keeps the step times and each run as soon as it is done, and the next call with the same file goes on
from there; calls with another --seed add to the same figures, and a p95 wants several. Step counts are multiplied by
--step-scale, which shortens all runs alike: in long simulations, the ratios of p95 at a scale of 1 and of 0.2 differ by
less than 0.02, and by 0.06 for urgent requests. --simulate runs the same systems in virtual time, where nothing is
simulated but how long a step takes: as long as --step-times-of says, or else about as long as on an H200.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from arrivals import SCENARIOS, Job, Scenario, base_shape, capacity_per_s, trace
from driving import RealClock, Run, drive
from figures import report
from on_device import NUM_TOKENS, EngineItself, Model, UNetSteps, overhead
from planned import best_setting, h200_profile, simulate, step_work_s
from results import Results, RunRecord, Setup
from systems import PRIORITY_BLIND, SYSTEMS, ServeBatches, Setting, StaticBatches, System

from t2v_core.config import SamplerName, UNetConfig
from t2v_core.engine import Engine, Profile, RowBudgets, free_memory_bytes, measure, warm_up
from t2v_core.shapes import LatentShape
from t2v_core.weights.random_init import TINY

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVERY_NUMBER_OF_ROWS = range(2, 34, 2)  # no graph is captured while a run is timed
OVERHEAD_REPEATS = {1: 30, 8: 6}  # by videos; a minute in all, on an H100


def main() -> None:
    arguments = _parser().parse_args()
    stop_s = time.monotonic() + arguments.stop_after_s
    shapes = sorted({shape for name in SCENARIOS for shape in _scenario(name, arguments).shapes})
    model = None if arguments.simulate else _model(arguments)
    results = _open(arguments, model, shapes)
    if arguments.overhead and model is not None:
        _measure_overhead(model, results, arguments)

    for load in arguments.loads:
        for name in arguments.scenarios:
            for system in arguments.systems:
                is_done = (name, load, system, arguments.seed) in {run.key for run in results.runs}
                if is_done or (system == "static_urgent" and not SCENARIOS[name].urgent):
                    continue
                record = _same_but_for_priorities(name, load, system, arguments, results.runs)
                record = record or _run(name, load, system, arguments, results.profile, model, stop_s)
                if record is not None:
                    results.runs.append(record)
                    results.save(arguments.results)
    sys.stdout.write(report(results) + "\n")


def _run(
    name: str,
    load: float,
    system: str,
    arguments: argparse.Namespace,
    profile: Profile,
    model: Model | None,
    stop_s: float,
) -> RunRecord | None:
    """One trace; None where there is no time left for it."""
    scenario = _scenario(name, arguments)
    rate_per_s = load * capacity_per_s(scenario, profile)
    jobs = trace(scenario, arguments.num_jobs, rate_per_s, arguments.seed)
    setting = best_setting(system, scenario, load, profile, base_shape(tiny=arguments.tiny))
    run = simulate(system, setting, profile, jobs)
    line = f"{name}, {load:.0%}, {system}: {run.busy_s:.1f} s of work expected"
    if model is not None:
        if time.monotonic() + run.busy_s > stop_s:
            _say(f"{line}; left for another call")
            return None
        run = _on_device(system, setting, profile, jobs, model)
        line += f", {run.busy_s:.1f} s found"
    _say(line)
    return RunRecord(
        scenario=name,
        load=load,
        system=system,
        seed=arguments.seed,
        cap_rows=setting.cap_rows,
        timeout_s=setting.timeout_s,
        rate_per_s=rate_per_s,
        end_s=run.end_s,
        num_steps=run.num_steps,
        num_rows=run.num_rows,
        work_rate=run.work_rate,
        latencies_s=tuple(run.latencies_s),
        is_urgent=tuple(job.priority == "urgent" for job in jobs),
    )


def _same_but_for_priorities(
    name: str, load: float, system: str, arguments: argparse.Namespace, runs: Sequence[RunRecord]
) -> RunRecord | None:
    """What a run that was made says of this one too: the arrivals are the same, and priorities play no part."""
    if system not in PRIORITY_BLIND:
        return None
    for run in runs:
        is_same = SCENARIOS[run.scenario].kinds == SCENARIOS[name].kinds
        if is_same and (run.load, run.system, run.seed) == (load, system, arguments.seed):
            jobs = trace(_scenario(name, arguments), arguments.num_jobs, run.rate_per_s, run.seed)
            is_urgent = tuple(job.priority == "urgent" for job in jobs)
            return run.model_copy(update={"scenario": name, "is_urgent": is_urgent})
    return None


def _scenario(name: str, arguments: argparse.Namespace) -> Scenario:
    return SCENARIOS[name].scaled(arguments.step_scale, tiny=arguments.tiny)


def _on_device(system: str, setting: Setting, profile: Profile, jobs: Sequence[Job], model: Model) -> Run:
    clock = RealClock()
    scheduler: System
    if system == "engine":
        budgets = RowBudgets(profile, free_bytes=free_memory_bytes(model.device))
        scheduler = EngineItself(Engine(model.unet, budgets, clock=clock.now), model)
    elif system == "serve_batch":
        scheduler = ServeBatches(UNetSteps(model), clock, setting)
    else:
        scheduler = StaticBatches(UNetSteps(model), setting, urgent_first=system == "static_urgent")
    return drive(scheduler, clock, jobs, lambda job: step_work_s(job.kind, profile))


def _measure_overhead(model: Model, results: Results, arguments: argparse.Namespace) -> None:
    samplers: tuple[SamplerName, ...] = ("dpmpp_2m", "euler_a")
    for num_videos, repeats in OVERHEAD_REPEATS.items():
        for sampler in samplers:
            if (sampler, num_videos) in {(found.sampler, found.num_videos) for found in results.overheads}:
                continue
            num_repeats = 2 if arguments.tiny else repeats
            measured = overhead(model, base_shape(tiny=arguments.tiny), sampler, num_videos, num_repeats)
            results.overheads.append(measured)
            results.save(arguments.results)


def _model(arguments: argparse.Namespace) -> Model:
    config = TINY.unet if arguments.tiny else UNetConfig()
    return Model(config, torch.device(arguments.device), DTYPES[arguments.dtype])


def _open(arguments: argparse.Namespace, model: Model | None, shapes: Sequence[LatentShape]) -> Results:
    """The results so far, or none yet but the step times of these shapes, measured now where there is a model."""
    profile = Results.load(arguments.step_times_of).profile if arguments.step_times_of else h200_profile(shapes)
    setup = Setup(
        machine=profile.device if model is None else _machine(model.device),
        dtype=profile.dtype if model is None else str(model.dtype),
        tiny=arguments.tiny,
        simulated=model is None,
        step_scale=arguments.step_scale,
        num_jobs=arguments.num_jobs,
    )
    if arguments.results.exists():
        results = Results.load(arguments.results)
        if results.setup != setup:
            raise SystemExit(f"{arguments.results}: is of {results.setup}, not of {setup}; use another file")
        if model is not None:
            warm_up(model.unet, shapes, results.profile, NUM_TOKENS, EVERY_NUMBER_OF_ROWS)
        return results
    if model is not None:
        profile = measure(model.unet, shapes, NUM_TOKENS)
        warm_up(model.unet, shapes, profile, NUM_TOKENS, EVERY_NUMBER_OF_ROWS)
        for m in profile.measurements:
            _say(f"{m.rows} rows of {tuple(m.shape)}: {m.step_s:.4f} s, {m.memory_bytes / 2**30:.2f} GiB")
    results = Results(setup=setup, profile=profile)
    results.save(arguments.results)
    return results


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="the results file, .json; goes on with it if it is there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--tiny", action="store_true", help="a tiny network and small latents, to try this out")
    parser.add_argument("--simulate", action="store_true", help="in virtual time, without a network")
    parser.add_argument("--step-times-of", type=Path, help="simulate with the step times of this results file")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=["identical", "mixed", "urgent"])
    parser.add_argument("--loads", nargs="+", type=float, default=[0.8], help="of capacity; 2 and more is saturation")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--num-jobs", type=int, default=80, help="of each run")
    parser.add_argument("--step-scale", type=float, default=0.2, help="0.2: 4, 5 and 10 steps for 20, 25 and 50")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--overhead", action="store_true", help="measure the engine's overhead before the runs")
    parser.add_argument("--stop-after-s", type=float, default=float("inf"), help="start no run that would end later")
    return parser


if __name__ == "__main__":
    main()
