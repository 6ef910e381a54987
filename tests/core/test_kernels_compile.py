"""All that the released networks call compiles for a Hopper GPU, whether or not there is one: nothing is run.

The networks are called without memory (on the meta device), and Triton is told that it has an H100.
"""

import importlib
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from t2v_core.autoencoder import Autoencoder
from t2v_core.config import ModelConfig
from t2v_core.kernels import ops
from t2v_core.unet3d import UNet3D
from t2v_core.weights.networks import quantise

triton = pytest.importorskip("triton", reason="torch brings Triton on Linux alone")
compiler = pytest.importorskip("triton.backends.compiler")
kernel_code = importlib.import_module("kernel_code")

SHARED_BYTES = 227 << 10  # of a processor, that one program can have
MOST_STACK_BYTES = 48  # a thread; twelve registers
GROUP_NORMS = {"_sums", "_scales", "_apply"}
UNET = GROUP_NORMS | {
    "_whole_groups",
    "_normalise",
    "_geglu_that_stays",
    "_attend",
    "_attend_to_text",
    "_add",
    "_join_quarters",
    "_multiply_taps",
    "_add_taps",
}


@pytest.fixture
def compiled():
    """Kernels by name, as they are called for."""
    with kernel_code.compiled_for_h100() as kernels:
        yield kernels


def prepared(network: type[nn.Module], config: object, *, in_fp8: bool = False) -> nn.Module:
    """As `weights.networks.prepare` does it on a GPU."""
    built = kernel_code.without_memory(network, config)
    if in_fp8:
        quantise(built)
    return built


def draw(*size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def check(kernels: dict, names: set[str], folder: Path) -> None:
    """Each fits into a processor, and keeps its registers there, but for a few."""
    assert kernels.keys() == names
    cubin = folder / "kernel.cubin"
    for name, variants in kernels.items():
        for kernel in variants:
            assert kernel.metadata.shared <= SHARED_BYTES, name
            cubin.write_bytes(kernel.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
            usage = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            assert int(re.findall(r"STACK:(\d+)", usage)[0]) <= MOST_STACK_BYTES, name


@pytest.mark.parametrize("in_fp8", [False, True], ids=["exact", "fp8"])
def test_the_unet(compiled, in_fp8, tmp_path):
    unet = prepared(UNet3D, ModelConfig().unet, in_fp8=in_fp8)
    for num_videos in (1, 8):
        rows = torch.arange(num_videos, device="meta").repeat(2)
        text = unet.read_text(draw(2 * num_videos, 77, 1024))
        eps = unet(draw(num_videos, 4, 16, 32, 32), draw(num_videos, dtype=torch.float32), text, rows)
        assert eps.shape == (2 * num_videos, 4, 16, 32, 32)
    of_precision = {"_geglu", "_conv_tile"} if in_fp8 else {"_in_turns", "_product_and_norm", "_conv_tiles"}
    check(compiled, UNET | {"_groups_in_parts"} | of_precision, tmp_path)


def test_the_unet_of_large_frames(compiled, tmp_path):
    unet = prepared(UNet3D, ModelConfig().unet)
    rows = torch.arange(1, device="meta").repeat(2)
    unet(draw(1, 4, 24, 40, 72), draw(1, dtype=torch.float32), unet.read_text(draw(2, 77, 1024)), rows)
    in_gluon = {"_in_turns", "_attend_over_pixels", "_product_and_norm", "_conv_tiles"}
    check(compiled, UNET | {"_conv_tile"} | in_gluon, tmp_path)


def test_the_decoder(compiled, tmp_path):
    autoencoder = prepared(Autoencoder, ModelConfig().autoencoder)
    frames = torch.cat(list(autoencoder.decode_chunks(draw(4, 16, 32, 32))))
    assert frames.shape == (16, 3, 256, 256)
    check(compiled, GROUP_NORMS | {"_whole_groups", "_add", "_multiply_taps", "_add_taps", "_weigh"}, tmp_path)


def test_a_gated_product_where_a_processor_has_less_memory(compiled, monkeypatch):
    """As on a GeForce GPU of compute capability 12.0."""
    from t2v_core.kernels import triton_geglu

    monkeypatch.setattr(ops, "_runs_gluon", lambda x: False)
    monkeypatch.setattr(triton_geglu, "shared_bytes", lambda device: 99 << 10)
    smaller = SimpleNamespace(
        get_current_target=lambda: compiler.GPUTarget("cuda", 120, 32),
        get_current_device=lambda: 98,  # a kernel's target is that of the first call on a device
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", smaller)
    for width in (320, 640):
        with torch.device("meta"):
            proj = nn.Linear(width, 8 * width).half()
        ops.geglu(draw(2, 16, 32, 32, width), proj)
    assert compiled.keys() == {"_geglu", "_geglu_that_stays"}
    shared = {name: [kernel.metadata.shared >> 10 for kernel in variants] for name, variants in compiled.items()}
    assert max(max(each) for each in shared.values()) <= 99, shared


@pytest.mark.parametrize("has_noise", [False, True])
def test_the_samplers_update(compiled, has_noise, tmp_path):
    latents, history = draw(2, 4, 16, 32, 32, dtype=torch.float32), draw(2, 2, 4, 16, 32, 32, dtype=torch.float32)
    noise = torch.empty_like(latents) if has_noise else None
    ops.sampler_update(latents, latents, history, noise, draw(2, 7, dtype=torch.float32))
    check(compiled, {"_update"}, tmp_path)


@pytest.mark.parametrize("piece", [64, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_convolutions_in_gluon(compiled, dtype, piece, tmp_path):
    from t2v_core.kernels import gluon_conv

    x, weight = draw(2, 16, 16, 16, 640, dtype=dtype), draw(10 * piece, 640, 3, 1, 1, dtype=dtype)
    out = gluon_conv.conv_over_time(x, weight.to(memory_format=torch.channels_last_3d), (piece,))
    assert out.shape == (2, 16, 16, 16, len(weight))
    of_frames = draw(len(weight), 640, 3, 3, dtype=dtype)
    out = gluon_conv.conv_frames(x, of_frames.to(memory_format=torch.channels_last), (piece,))
    assert out.shape == (2, 16, 16, 16, len(weight))
    check(compiled, {"_conv_tiles"}, tmp_path)


def test_a_kernel_in_gluon_is_compiled_once_whatever_the_number_of_rows(compiled):
    """What `ops` has held against its plain equivalent is what runs from then on."""
    from t2v_core.kernels import gluon_attention, gluon_geglu, gluon_linear_norm

    weight, offset = draw(320, 320), draw(320)
    norm = nn.LayerNorm(320, device="meta", dtype=torch.float16)
    proj = nn.Linear(320, 2560, device="meta", dtype=torch.float16)
    for blocks in (1, 15, 16, 132, 200):  # specialised, 1 and multiples of 16 would be kernels of their own
        rows = draw(128 * blocks, 320)
        gluon_geglu.geglu(rows, proj)
        gluon_linear_norm.linear_norm(rows, weight, offset, norm)
        gluon_attention.spatial_attention(draw(1, 1, 1, blocks, 3 * 320), heads=5)
    assert {name: len(variants) for name, variants in compiled.items()} == {
        "_in_turns": 1,
        "_product_and_norm": 1,
        "_attend_over_pixels": 1,
    }
