r"""What our kernels are compiled to for an H100, whether or not there is one: their loops, by instructions.

    python load_tests/kernel_code.py
    python load_tests/kernel_code.py --case 1024 --kernels _apply _attend_over_pixels --in-order

The released network of a case is called without memory (on the meta device). Of each kernel that it calls for, and of
each of its variants: warps, shared memory, registers that a thread keeps in memory instead, and how many instructions
of which kinds its innermost loops have, or all of it where it has none. A loop of products alone does not say how long
they take, but one that adds or loads does: a processor begins four warps' instructions at a time, and those of some
kinds (MUFU: powers, reciprocals) take it eight times as long.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from gpu_peers import NUM_TOKENS, Case, cases_named
from gpu_results import CASE_NAMES
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from t2v_core import transformers
from t2v_core.autoencoder import Autoencoder
from t2v_core.config import ModelConfig
from t2v_core.kernels import first_results, fp8, ops
from t2v_core.unet3d import UNet3D
from t2v_core.weights.networks import fuse

Kernels = Mapping[str, Sequence[Any]]  # by name, what Triton has compiled

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)")
_LABEL = re.compile(r"^(?P<name>\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((?P<label>\.L_x_\d+)\)")
_LEAST_OF_A_LOOP = 16  # instructions: others only wait
_KINDS = 16


def main() -> None:
    arguments = _parser().parse_args()
    (case,) = cases_named([arguments.case], tiny=False)
    with compiled_for_h100() as kernels:
        _call(case)
    for name, variants in kernels.items():
        if not arguments.kernels or name in arguments.kernels:
            for kernel in variants:
                sys.stdout.write(_described(name, kernel, in_order=arguments.in_order) + "\n")


@contextmanager
def compiled_for_h100() -> Iterator[Kernels]:
    """All that is called for on the meta device, which is compiled and not run."""
    h100 = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 99,  # no other's kernels are among its
        get_current_stream=lambda device: 0,
    )
    kernels: dict[str, list[Any]] = defaultdict(list)
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel not in kernels[self.__name__]:
            kernels[self.__name__].append(kernel)
        return kernel

    with ExitStack() as stack:

        def patch(where: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(where, name, value))

        patch(JITFunction, "run", compile_only)
        for name in ("_runs_triton", "_has_copy_engine", "_runs_gluon"):
            patch(ops, name, lambda x: x.dtype in ops._DTYPES)
        patch(ops, "_scalar", lambda value, device: torch.empty((), device=device))
        patch(first_results, "_is_captured", lambda: True)  # results have no values either
        for module in (fp8, transformers):  # which look at the weights' values, and there are none
            patch(module, "quantised", lambda *weights: tuple(weight.to(fp8.FP8) for weight in weights))
        patch(triton.runtime.driver, "_active", h100)
        with torch.inference_mode():
            yield kernels


def without_memory(network: type[nn.Module], config: object) -> Any:
    """As it is prepared for a GPU, in half precision."""
    with torch.device("meta"):
        built = network(config).half().eval().requires_grad_(False)
    fuse(built)
    return built


def _call(case: Case) -> None:
    config, latents = ModelConfig(), _empty(case.num_videos, *case.shape.latents())
    if case.is_decode:
        list(without_memory(Autoencoder, config.autoencoder).decode_chunks(latents[0]))
        return
    unet = without_memory(UNet3D, config.unet)
    rows = torch.arange(case.num_videos, device="meta").repeat(2)
    text = unet.read_text(_empty(len(rows), NUM_TOKENS, config.unet.cross_attention_dim))
    unet(latents, _empty(case.num_videos).float(), text, rows)


def _empty(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float16, device="meta")


def _described(name: str, kernel: Any, *, in_order: bool) -> str:
    lines = _code(kernel)
    spilled = sum("STL" in line for line in lines)
    about = f"{kernel.metadata.num_warps} warps, {kernel.metadata.shared} bytes shared, {spilled} stores of registers"
    loops = _innermost_loops(lines)
    parts = [(f"loop {i} of {len(loops)}", loop) for i, loop in enumerate(loops, 1)] or [("all", lines)]
    return "\n".join([f"{name}: {about}", *(_instructions(what, part, in_order=in_order) for what, part in parts)])


def _code(kernel: Any) -> list[str]:
    """Instructions and labels, as NVIDIA's disassembler writes them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return [line for line in text.splitlines() if _INSTRUCTION.search(line) or _LABEL.match(line)]


def _innermost_loops(lines: Sequence[str]) -> list[Sequence[str]]:
    """From a label to a branch back to it, with no other such between them."""
    at = {match["name"]: number for number, line in enumerate(lines) if (match := _LABEL.match(line))}
    spans = [
        (at[match["label"]], number)
        for number, line in enumerate(lines)
        if (match := _BRANCH.search(line)) and number - at.get(match["label"], number) >= _LEAST_OF_A_LOOP
    ]
    return [
        lines[first : last + 1]
        for first, last in spans
        if not any(first <= start and end <= last for start, end in spans if (start, end) != (first, last))
    ]


def _instructions(what: str, lines: Sequence[str], *, in_order: bool) -> str:
    names = [match["name"].split(".")[0] for line in lines if (match := _INSTRUCTION.search(line))]
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(names).most_common(_KINDS))
    text = f"    {what}, {len(names)} instructions: {kinds}"
    return f"{text}\n        {' '.join(names)}" if in_order else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASE_NAMES, default="1")
    parser.add_argument("--kernels", nargs="+", help="by their names; all, unless given")
    parser.add_argument("--in-order", action="store_true", help="also all instructions, one after the other")
    return parser


if __name__ == "__main__":
    main()
