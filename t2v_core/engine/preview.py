"""Small pictures of latents without a decoder: colours are nearly linear in the latents."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from t2v_core.autoencoder import Autoencoder
from t2v_core.shapes import SPATIAL_SCALE

_NUM_PICTURES = 16
_SIDE = 64
_PATCHES = 4  # a side: large areas of one colour, as most of a video is


@dataclass(frozen=True, slots=True, eq=False)
class LatentsToRGB:
    """A linear map from a latent to the mean colour of the pixels that it stands for. weight: (3, c), bias: (3,)."""

    weight: Tensor
    bias: Tensor

    @classmethod
    @torch.inference_mode()
    def fit(cls, autoencoder: Autoencoder) -> Self:
        """The map that is best, by least squares, for pictures of coloured patches that this model encodes."""
        parameter = next(autoencoder.parameters())
        generator = torch.Generator().manual_seed(0)
        patches = 2 * torch.rand((_NUM_PICTURES, 3, _PATCHES, _PATCHES), generator=generator) - 1
        patches[: _NUM_PICTURES // 2] = patches[: _NUM_PICTURES // 2].sign() * 0.9
        pictures = torch.cat(
            [
                F.interpolate(patches[::2], size=(_SIDE, _SIDE)),
                F.interpolate(patches[1::2], size=(_SIDE, _SIDE), mode="bilinear"),
            ]
        )
        frames = rearrange(pictures.to(parameter), "f c h w -> 1 c f h w")
        latents = rearrange(autoencoder.encode(frames).mean[0], "c f h w -> (f h w) c").double().cpu()
        colours = rearrange(F.avg_pool2d(pictures, SPATIAL_SCALE), "f c h w -> (f h w) c").double()
        ones = torch.ones(len(latents), 1, dtype=torch.float64)
        solution = torch.linalg.lstsq(torch.cat([latents, ones], dim=1), colours).solution
        return cls(solution[:-1].T.float().to(parameter.device), solution[-1].float().to(parameter.device))

    def __call__(self, latents: Tensor) -> Tensor:
        """latents: (c, f, h, w) -> uint8 (f, h, w, 3), on the latents' device."""
        colours = torch.einsum("kc,cfhw->fhwk", self.weight, latents.to(self.weight)) + self.bias
        return ((colours / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
