"""One step of the UNet and one decode, as diffusers runs them and as we do, on the same weights and inputs."""

import importlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from t2v_core.autoencoder import Autoencoder
from t2v_core.config import ModelConfig
from t2v_core.graphs import GraphedUNet, replay_decoder
from t2v_core.shapes import SPATIAL_SCALE, VideoShape
from t2v_core.unet3d import UNet3D
from t2v_core.weights.diffusers_config import AUTOENCODER_CONFIG, UNET_CONFIG, config_files
from t2v_core.weights.networks import prepare
from t2v_core.weights.random_init import randomise

NUM_TOKENS = 77

Weights = Mapping[str, Tensor]
Call = Callable[[Tensor], Tensor]  # of latents: what is timed


@dataclass(frozen=True, slots=True)
class Case:
    """What is computed at once: a step with guidance of some videos, or a decode of one."""

    name: str
    shape: VideoShape
    num_videos: int = 1
    is_decode: bool = False


CASES = (
    Case("1", VideoShape(num_frames=16, height=256, width=256)),
    Case("8", VideoShape(num_frames=16, height=256, width=256), num_videos=8),
    Case("576", VideoShape(num_frames=24, height=320, width=576)),
    Case("1024", VideoShape(num_frames=24, height=576, width=1024)),
    Case("decode256", VideoShape(num_frames=16, height=256, width=256), is_decode=True),
    Case("decode1024", VideoShape(num_frames=24, height=576, width=1024), is_decode=True),
)
_TINY_CASES = (
    Case("1", VideoShape(num_frames=3, height=128, width=128)),
    Case("8", VideoShape(num_frames=3, height=128, width=128), num_videos=8),
    Case("576", VideoShape(num_frames=5, height=40, width=72)),
    Case("1024", VideoShape(num_frames=6, height=72, width=128)),
    Case("decode256", VideoShape(num_frames=4, height=64, width=64), is_decode=True),
    Case("decode1024", VideoShape(num_frames=6, height=72, width=128), is_decode=True),
)


def cases_named(names: Collection[str], *, tiny: bool) -> list[Case]:
    """In their own order, at full size or tiny."""
    return [case for case in (_TINY_CASES if tiny else CASES) if case.name in names]


class Work(Protocol):
    """A case with its weights and inputs on the device, for any of the systems that can do it."""

    latents: Tensor

    def build(self, system: str) -> Any:  # Any: diffusers is not imported for its types alone
        """A system's network with its weights, and nothing else that takes memory."""

    def bind(self, system: str, network: Any) -> Call:
        """All that is done once a request, and the call that is then done each step."""

    def reference(self) -> Tensor:
        """The result in float32, by diffusers, from the weights and inputs as they were rounded."""


class UNetStep:
    """eps of every row, prompts then negative prompts. Each system is given all that does not change between steps."""

    systems = ("diffusers", "diffusers+compile", "t2v", "t2v+graphs", "t2v+fp8")

    def __init__(self, config: ModelConfig, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._weights = config, _random_weights(UNet3D, config.unet, device, dtype)
        generator = torch.Generator(device).manual_seed(1)
        size = (case.num_videos, *case.shape.latents())
        self.latents = torch.randn(size, generator=generator, device=device, dtype=dtype)
        self._rows = torch.arange(case.num_videos, device=device).repeat(2)
        self._timesteps = torch.linspace(981.0, 21.0, case.num_videos, device=device)
        text_size = (len(self._rows), NUM_TOKENS, config.unet.cross_attention_dim)
        self._text_embeds = torch.randn(text_size, generator=generator, device=device, dtype=dtype)

    def build(self, system: str) -> Any:
        if system.startswith("t2v"):
            return _our_network(UNet3D, self._config.unet, self._weights, fp8=system == "t2v+fp8")
        return self._diffusers(self._weights)

    def bind(self, system: str, network: Any) -> Call:
        rows, timesteps = self._rows, self._timesteps
        if system.startswith("t2v"):
            text = network.read_text(self._text_embeds)
            unet = network if system == "t2v" else GraphedUNet(network)
            return lambda latents: unet(latents, timesteps, text, rows)
        if system == "diffusers+compile":
            network = torch.compile(network, dynamic=False)
        timesteps, text_embeds = timesteps[rows], self._text_embeds
        return lambda latents: network(latents[rows], timesteps, text_embeds, return_dict=False)[0]

    def reference(self) -> Tensor:
        network = self._diffusers({name: tensor.float() for name, tensor in self._weights.items()})
        samples, text_embeds = self.latents.float()[self._rows], self._text_embeds.float()
        timesteps = self._timesteps[self._rows]
        # Row by row, so that the largest case fits in float32 as well.
        rows = [slice(row, row + 1) for row in range(len(samples))]
        return torch.cat(
            [network(samples[row], timesteps[row], text_embeds[row], return_dict=False)[0] for row in rows]
        )

    def _diffusers(self, weights: Weights) -> Any:
        return _diffusers_network("UNet3DConditionModel", UNET_CONFIG, self._config, weights)


class Decode:
    """The frames of one video, as decoded: float, (f, 3, h, w)."""

    systems = ("diffusers", "diffusers+compile", "t2v", "t2v+graphs")

    def __init__(self, config: ModelConfig, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._weights = config, _random_weights(Autoencoder, config.autoencoder, device, dtype)
        generator = torch.Generator(device).manual_seed(1)
        self.latents = torch.randn(case.shape.latents(), generator=generator, device=device, dtype=dtype)

    def build(self, system: str) -> Any:
        if system.startswith("t2v"):
            return _our_network(Autoencoder, self._config.autoencoder, self._weights)
        network = self._diffusers(self._weights)
        return network.to(memory_format=torch.channels_last) if system == "diffusers+compile" else network

    def bind(self, system: str, network: Any) -> Call:
        if system.startswith("t2v"):
            if system == "t2v+graphs":
                replay_decoder(network)
            return lambda latents: torch.cat(list(network.decode_chunks(latents)))

        def decode(frames: Tensor) -> Tensor:  # one function, since compiling the module leaves its `decode` as it is
            return network.decode(frames, return_dict=False)[0]

        if system == "diffusers+compile":
            compiled = torch.compile(decode, dynamic=False)
            return lambda latents: self._all_frames(
                lambda frames: compiled(frames.contiguous(memory_format=torch.channels_last)), latents
            )
        return lambda latents: self._all_frames(decode, latents)

    def reference(self) -> Tensor:
        network = self._diffusers({name: tensor.float() for name, tensor in self._weights.items()})
        return self._all_frames(lambda frames: network.decode(frames, return_dict=False)[0], self.latents.float())

    def _all_frames(self, decode: Call, latents: Tensor) -> Tensor:
        """As diffusers' pipeline decodes: all frames at once, or one by one (its `enable_slicing`) if that is too much.

        Too much is what torch's 32-bit indices cannot count: the widest activation is of 256 channels at full size.
        """
        frames = (latents / self._config.autoencoder.scaling_factor).transpose(0, 1)
        pixels = frames.shape[0] * frames.shape[2] * frames.shape[3] * SPATIAL_SCALE**2
        if pixels * self._config.autoencoder.block_out_channels[1] < 2**31:
            return decode(frames)
        return torch.cat([decode(frame) for frame in torch.split(frames, 1)])

    def _diffusers(self, weights: Weights) -> Any:
        return _diffusers_network("AutoencoderKL", AUTOENCODER_CONFIG, self._config, weights)


def make_work(config: ModelConfig, case: Case, device: torch.device, dtype: torch.dtype) -> Work:
    """Random weights, the same for every case, and random inputs."""
    if case.is_decode:
        return Decode(config, case, device, dtype)
    return UNetStep(config, case, device, dtype)


def diffusers_version() -> str | None:
    """None where diffusers cannot be imported."""
    try:
        return str(importlib.import_module("diffusers").__version__)
    except ImportError:
        return None


def _random_weights(network: type[nn.Module], config: object, device: torch.device, dtype: torch.dtype) -> Weights:
    with torch.device("meta"):
        built = network(config)
    randomise(built.to_empty(device=device), torch.Generator(device).manual_seed(0))
    return {name: tensor.contiguous() for name, tensor in built.to(dtype).state_dict().items()}


def _our_network(network: type[nn.Module], config: object, weights: Weights, *, fp8: bool = False) -> Any:
    with torch.device("meta"):
        built = network(config)
    # Copies, since they are prepared in place.
    built.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return prepare(built, fp8=fp8)


def _diffusers_network(class_name: str, path: str, config: ModelConfig, weights: Weights) -> Any:
    """diffusers' own class, from the JSON that we write. Its names of the weights are ours."""
    with torch.device("meta"):
        network = getattr(importlib.import_module("diffusers"), class_name).from_config(
            json.loads(config_files(config)[path])
        )
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()
