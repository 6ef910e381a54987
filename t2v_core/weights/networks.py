"""Networks with their weights: built without memory, checked strictly, then given the tensors as they are."""

from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from t2v_core.autoencoder import Autoencoder
from t2v_core.errors import CheckpointError
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.text_encoder import TextEncoder
from t2v_core.unet3d import UNet3D
from t2v_core.weights.checkpoint import Checkpoint

NetworkT = TypeVar("NetworkT", bound=nn.Module)

_NUM_NAMED = 3


@runtime_checkable
class Fusible(Protocol):
    """A module with several layers that can be one."""

    def fuse(self) -> None: ...


@runtime_checkable
class Quantisable(Protocol):
    """A module with layers that can have fp8."""

    def quantise(self) -> None: ...


def load_unet(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> UNet3D:
    """The denoiser, ready to run.

    Raises CheckpointError where a tensor is missing, unexpected or misshapen, and OutOfMemory.
    """
    with torch.device("meta"):
        unet = UNet3D(checkpoint.config.unet)
    return _load(unet, "unet", checkpoint.read("unet"), checkpoint.name, device, dtype, fp8=fp8)


def load_autoencoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """The autoencoder, ready to run. Raises as `load_unet`."""
    with torch.device("meta"):
        autoencoder = Autoencoder(checkpoint.config.autoencoder)
    return _load(autoencoder, "autoencoder", checkpoint.read("autoencoder"), checkpoint.name, device, dtype)


def load_text_encoder(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The text encoder, ready to run. Raises as `load_unet`."""
    with torch.device("meta"):
        text_encoder = TextEncoder(checkpoint.config.text_encoder)
    return _load(text_encoder, "text_encoder", checkpoint.read("text_encoder"), checkpoint.name, device, dtype)


@out_of_memory_explained("free memory there, use another device, or half precision")
def _load(
    network: NetworkT,
    network_name: str,
    tensors: dict[str, Tensor],
    checkpoint_name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    fp8: bool = False,
) -> NetworkT:
    _check(f"{checkpoint_name}: {network_name}", network.state_dict(), tensors)
    # One tensor at a time: a memory-mapped one that needs no conversion stays where it is.
    for name in tensors:
        tensors[name] = tensors[name].to(device=device, dtype=dtype)
    network.load_state_dict(tensors, assign=True)
    return prepare(network, fp8=fp8)


def prepare(network: NetworkT, *, fp8: bool = False) -> NetworkT:
    """The network ready to run fast, and never to be trained: in place, and the weights keep their names and values.

    On a GPU, layers that can be one are fused, and kernels of convolutions laid out as its library wants them. On a
    CPU the one gains little, and the other nothing. With `fp8`, weights after a norm are rounded to that (see
    `kernels.fp8`), on any device.
    """
    network.requires_grad_(False).eval()
    if next(network.parameters()).is_cuda or fp8:
        fuse(network)
    if fp8:
        quantise(network)
    return network


def fuse(network: nn.Module) -> None:
    """Make layers one that can be, and lay kernels of convolutions out with their channels last: in place."""
    for module in network.modules():
        if isinstance(module, Fusible):
            module.fuse()
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.to(memory_format=torch.channels_last)
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.to(memory_format=torch.channels_last_3d)


def quantise(network: nn.Module) -> None:
    """Round weights after a norm to fp8: in place, after `fuse`."""
    for module in network.modules():
        if isinstance(module, Quantisable):
            module.quantise()


def _check(where: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    problems = (
        ("lacks", [name for name in expected if name not in found]),
        ("has unexpected", [name for name in found if name not in expected]),
        (
            "has misshapen",
            [
                f"{name} {tuple(found[name].shape)}, must be {tuple(tensor.shape)}"
                for name, tensor in expected.items()
                if name in found and found[name].shape != tensor.shape
            ],
        ),
    )
    for verb, names in problems:
        if names:
            more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
            raise CheckpointError(
                f"{where} {verb} {'; '.join(names[:_NUM_NAMED])}{more}: "
                "the file is of another model or incomplete; fetch it again"
            )
