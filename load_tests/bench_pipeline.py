"""Time and memory of one video, ours beside diffusers', each in a process of its own on the same checkpoint.

    t2v random-checkpoint build/full --size full --dtype fp16
    python load_tests/bench_pipeline.py build/full --device cuda --dtype fp16 --steps 50 --runs 3

Random weights take the time and the memory of real ones. Loading starts from a warm page cache. The first video of each
is the warm-up and is not counted; the figures are medians of the others. Memory is the peak of allocated tensors on a
GPU, and of the process's resident set on a CPU.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch

PROMPT = "A panda eating bamboo on a rock."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Makes a video; returns when it started, when each step was done, and when the frames were on the CPU.
Run = Callable[[], list[float]]


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.implementation:
        sys.stdout.write(json.dumps(measure(arguments)) + "\n")
        return
    lines = [
        f"{_machine(arguments.device)}, {arguments.dtype}, {arguments.num_frames} frames of "
        f"{arguments.width}x{arguments.height}, {arguments.steps} steps of ddim, guidance 9, torch {torch.__version__}",
        "| | load | one step | decode | whole video | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for implementation in IMPLEMENTATIONS:
        command = [sys.executable, __file__, *sys.argv[1:], "--implementation", implementation]
        child = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        figures = json.loads(child.stdout.splitlines()[-1])
        lines.append(
            f"| {implementation} | {figures['load_s']:.1f} s | {figures['step_s']:.3f} s | {figures['decode_s']:.3f} s "
            f"| {figures['total_s']:.2f} s | {figures['peak_gib']:.2f} GiB |"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One implementation's figures, in seconds and GiB."""
    started = time.perf_counter()
    run = IMPLEMENTATIONS[arguments.implementation](arguments)
    _wait(arguments.device)
    load_s = time.perf_counter() - started

    on_gpu = arguments.device.startswith("cuda")
    for _ in range(arguments.warmup):
        run()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    runs = [run() for _ in range(arguments.runs)]
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "load_s": load_s,
        # The first step is left out: the text encoder runs before it.
        "step_s": statistics.median(after - before for marks in runs for before, after in pairwise(marks[1:-1])),
        "decode_s": statistics.median(marks[-1] - marks[-2] for marks in runs),
        "total_s": statistics.median(marks[-1] - marks[0] for marks in runs),
        "peak_gib": peak / 2**30,
    }


def _t2v(arguments: argparse.Namespace) -> Run:
    import t2v_core

    pipeline = t2v_core.load(arguments.checkpoint, device=arguments.device, dtype=DTYPES[arguments.dtype])
    params = pipeline.params(
        PROMPT,
        seed=0,
        width=arguments.width,
        height=arguments.height,
        num_frames=arguments.num_frames,
        num_inference_steps=arguments.steps,
        guidance_scale=9.0,
        sampler="ddim",
    )

    def run() -> list[float]:
        marks = [time.perf_counter()]
        for trajectory in pipeline.denoise(params):
            latents = trajectory.latents
            _wait(arguments.device)
            marks.append(time.perf_counter())
        pipeline.decode(latents)
        return [*marks, time.perf_counter()]

    return run


def _diffusers(arguments: argparse.Namespace) -> Run:
    import diffusers

    pipeline = diffusers.TextToVideoSDPipeline.from_pretrained(
        arguments.checkpoint, torch_dtype=DTYPES[arguments.dtype]
    ).to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)

    def run() -> list[float]:
        marks = [time.perf_counter()]

        def after_step(step: int, timestep: int, latents: torch.Tensor) -> None:
            _wait(arguments.device)
            marks.append(time.perf_counter())

        pipeline(
            PROMPT,
            num_inference_steps=arguments.steps,
            width=arguments.width,
            height=arguments.height,
            num_frames=arguments.num_frames,
            guidance_scale=9.0,
            generator=torch.Generator().manual_seed(0),
            callback=after_step,
        )
        return [*marks, time.perf_counter()]

    return run


IMPLEMENTATIONS: dict[str, Callable[[argparse.Namespace], Run]] = {"t2v": _t2v, "diffusers": _diffusers}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _machine(device: str) -> str:
    return (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", help="a folder in the diffusers layout, tokenizer included")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
