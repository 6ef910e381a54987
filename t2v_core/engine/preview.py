"""Small pictures of a video that is not finished: some of its frames, decoded, or all of them, at hardly any cost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from t2v_core.autoencoder import Autoencoder
from t2v_core.shapes import SPATIAL_SCALE

# From latents, (c, f, h, w), to uint8 frames (f', h', w', 3), not necessarily all, on the latents' device.
Previewer = Callable[[Tensor], Tensor]

_NUM_PICTURES = 32
_SIDE = 64
_PATCHES = 2  # a side: large areas of one colour, as most of a video is


@dataclass(frozen=True, slots=True, eq=False)
class FewFrames:
    """Decodes some frames, spread evenly, or the one in the middle: each costs what it costs in the finished video."""

    autoencoder: Autoencoder
    num_frames: int = 4

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        last, number = latents.shape[1] - 1, min(self.num_frames, latents.shape[1])
        spread = torch.linspace(0, last, number) if number > 1 else torch.tensor([last / 2])
        few = torch.stack([latents[:, frame] for frame in spread.round().int().tolist()], dim=1)
        few = few.to(next(self.autoencoder.parameters()))
        return _to_bytes(rearrange(torch.cat(list(self.autoencoder.decode_chunks(few))), "f c h w -> f h w c"))


@dataclass(frozen=True, slots=True, eq=False)
class LatentsToRGB:
    """A linear map from a latent to the mean colour of the pixels that it stands for: one pixel for each latent.

    Nearly free, and as good as the latents are linear in colours. weight: (3, c), bias: (3,).
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    @torch.inference_mode()
    def fit(cls, autoencoder: Autoencoder) -> Self:
        """The map that is best, by least squares, for pictures of coloured patches that this model encodes."""
        parameter = next(autoencoder.parameters())
        generator = torch.Generator().manual_seed(0)
        size = (_NUM_PICTURES // 2, 3, _PATCHES, _PATCHES)
        plain = 0.95 * (torch.randint(3, size, generator=generator) - 1.0)
        shaded = 2 * torch.rand(size, generator=generator) - 1
        side = (_SIDE, _SIDE)
        pictures = torch.cat([F.interpolate(plain, side), F.interpolate(shaded, side, mode="bilinear")])
        frames = rearrange(pictures.to(parameter), "f c h w -> 1 c f h w")
        latents = rearrange(autoencoder.encode(frames).mean[0], "c f h w -> (f h w) c").double().cpu()
        colours = rearrange(F.avg_pool2d(pictures, SPATIAL_SCALE), "f c h w -> (f h w) c").double()
        ones = torch.ones(len(latents), 1, dtype=torch.float64)
        solution = torch.linalg.lstsq(torch.cat([latents, ones], dim=1), colours).solution
        return cls(solution[:-1].T.float().to(parameter.device), solution[-1].float().to(parameter.device))

    def __call__(self, latents: Tensor) -> Tensor:
        return _to_bytes(torch.einsum("kc,cfhw->fhwk", self.weight, latents.to(self.weight)) + self.bias)


def _to_bytes(colours: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    return ((colours.float() / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
