"""A request on its way from noise to video: the one value that changes from step to step."""

from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from t2v_core.errors import UnreadableTrajectory
from t2v_core.shapes import LatentShape
from t2v_core.transfers import fetch, to_device


class NoiseSource:
    """A request's own noise, drawn on the CPU in float32, so that it is the same on every device.

    It is made from a seed, or from the state another one had reached.
    """

    def __init__(self, seed: int | None = None, state: Tensor | None = None) -> None:
        self._generator = torch.Generator("cpu")
        if state is not None:
            self._generator.set_state(state)
        else:
            assert seed is not None
            self._generator.manual_seed(seed)

    @property
    def state(self) -> Tensor:
        """All that later draws depend on: uint8."""
        return self._generator.get_state()

    def video(self, shape: LatentShape) -> Tensor:
        """Noise for a whole video: (c, f, h, w)."""
        return torch.randn(shape, generator=self._generator)

    def frames(self, shape: LatentShape) -> Tensor:
        """Noise drawn frame by frame, the order in which diffusers draws all but the first: (c, f, h, w)."""
        c, f, h, w = shape
        return rearrange(self.fill(torch.empty(f, c, h, w)), "f c h w -> c f h w")

    def fill(self, frames: Tensor) -> Tensor:
        """The same noise, written where it is wanted. frames: (f, c, h, w), float32, on the CPU."""
        return torch.randn(frames.shape, generator=self._generator, out=frames)


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """Where a request stands after `step_index` of `num_steps` steps.

    latents: (c, f, h, w), x at the current timestep.
    history: (2, c, f, h, w), the last two predictions of x0, newest first; zeros before there are any.
    noise_state: what the request's `NoiseSource` continues from.
    """

    latents: Tensor
    history: Tensor
    noise_state: Tensor
    num_steps: int
    step_index: int = 0

    @classmethod
    def start(cls, latents: Tensor, noise_state: Tensor, num_steps: int) -> Self:
        """A request before its first step. latents: (c, f, h, w)."""
        return cls(latents, torch.zeros_like(latents).repeat(2, 1, 1, 1, 1), noise_state, num_steps)

    def to_bytes(self) -> bytes:
        """The request as a safetensors file, exact to the bit."""
        steps = torch.tensor([self.num_steps, self.step_index])
        latents, history = fetch(self.latents.contiguous(), self.history.contiguous())
        return save({"latents": latents, "history": history, "noise_state": self.noise_state, "steps": steps})

    @classmethod
    def from_bytes(cls, file: bytes, device: torch.device | str = "cpu") -> Self:
        """What `to_bytes` wrote, on a device. Raises UnreadableTrajectory for anything else."""
        try:
            tensors = load(file)
            latents, history, noise_state = (tensors[name] for name in ("latents", "history", "noise_state"))
            num_steps, step_index = tensors["steps"].tolist()
            is_whole = (
                latents.dim() == 4
                and latents.is_floating_point()
                and latents.numel() > 0
                and history.shape == (2, *latents.shape)
                and tensors["steps"].dtype == torch.int64
                and 0 <= step_index <= num_steps
            )
            NoiseSource(state=noise_state)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UnreadableTrajectory(
                f"{len(file)} bytes are no saved trajectory ({error}): start the request anew"
            ) from error
        if not is_whole:
            raise UnreadableTrajectory(
                f"trajectory of latents {tuple(latents.shape)} with history {tuple(history.shape)} after step "
                f"{step_index} of {num_steps}: its parts do not belong together; start the request anew"
            )
        device = torch.device(device)
        return cls(to_device(latents, device), to_device(history, device), noise_state, num_steps, step_index)

    @property
    def x0(self) -> Tensor:
        """The newest prediction of the final latents, of which a decoder makes a preview: (c, f, h, w)."""
        return self.history[0]

    @property
    def is_finished(self) -> bool:
        return self.step_index == self.num_steps

    @property
    def shape(self) -> LatentShape:
        return LatentShape(*self.latents.shape)
