"""What a checkpoint is: the sizes of its networks, its noise schedule, its defaults. Plain data.

The default values are those of ModelScope's 1.7 B model.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from t2v_core.shapes import VideoShape

DType = Literal["fp32", "bf16", "fp16"]
# Of the UNet's products: as they are, or those after a norm by numbers of 8 bits (see `kernels.fp8`), not quite exact.
Precision = Literal["exact", "fp8"]
MAX_CACHED_STEPS = 9  # in a row: see `denoising.denoise_step`
SamplerName = Literal["ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_3m", "unipc"]
SAMPLER_NAMES: tuple[SamplerName, ...] = get_args(SamplerName)


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Sizes of the denoiser. One entry of the tuples per resolution, from fine to coarse."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # which resolutions have transformers
    layers_per_block: int = 2
    attention_head_dim: int = 64
    cross_attention_dim: int = 1024
    norm_num_groups: int = 32


@dataclass(frozen=True, slots=True)
class AutoencoderConfig:
    """Sizes of the KL autoencoder. Four resolutions make it an f8 autoencoder."""

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_attention: bool = True
    scaling_factor: float = 0.18215


@dataclass(frozen=True, slots=True)
class TextEncoderConfig:
    """Sizes of the CLIP text tower. `layers` counts the layers that run, not those it was trained with."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 1024
    heads: int = 16
    layers: int = 23  # OpenCLIP ViT-H-14 has 24; the UNet was trained on the penultimate one
    mlp_width: int = 4096


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """The noise schedule of training: betas linear in their square root."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request gets where it says nothing."""

    width: int = 256
    height: int = 256
    num_frames: int = 16
    fps: int = 8
    num_inference_steps: int = 25
    guidance_scale: float = 9.0
    sampler: SamplerName = "dpmpp_2m"
    strength: float = 0.6

    @property
    def shape(self) -> VideoShape:
        """Of the video."""
        return VideoShape(self.num_frames, self.height, self.width)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole checkpoint."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
