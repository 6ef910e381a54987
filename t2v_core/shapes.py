"""The two shapes of a video: in pixels and in latents."""

from typing import NamedTuple

SPATIAL_SCALE = 8  # the autoencoder's downsampling: one latent stands for 8 x 8 pixels
LATENT_CHANNELS = 4


class LatentShape(NamedTuple):
    """A video in latent space, without its batch dimension: (c, f, h, w)."""

    channels: int
    num_frames: int
    height: int
    width: int


class VideoShape(NamedTuple):
    """A video in pixels. Both sides are multiples of 8."""

    num_frames: int
    height: int
    width: int

    def latents(self) -> LatentShape:
        """The shape of the latents that decode to this video."""
        return LatentShape(LATENT_CHANNELS, self.num_frames, self.height // SPATIAL_SCALE, self.width // SPATIAL_SCALE)
