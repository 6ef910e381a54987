"""The JSON files of the diffusers layout: a checkpoint's sizes, read strictly and written back."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from t2v_core.config import (
    AutoencoderConfig,
    GenerationDefaults,
    ModelConfig,
    SamplerName,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from t2v_core.errors import CheckpointError
from t2v_core.weights.files import read_json

GENERATION_CONFIG = "generation_config.json"  # ours: the defaults of a checkpoint whose sizes are not well known
UNET_CONFIG = "unet/config.json"
AUTOENCODER_CONFIG = "vae/config.json"
TEXT_ENCODER_CONFIG = "text_encoder/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"

NETWORK_CONFIGS = (UNET_CONFIG, AUTOENCODER_CONFIG, TEXT_ENCODER_CONFIG, SCHEDULER_CONFIG)


def read_config(folder: Path) -> ModelConfig:
    """What a folder's JSON files say. Raises CheckpointError for another kind of model than this one."""
    unet = read_json(folder / UNET_CONFIG, _UNetFile)
    autoencoder = read_json(folder / AUTOENCODER_CONFIG, _AutoencoderFile)
    text = read_json(folder / TEXT_ENCODER_CONFIG, _TextEncoderFile)
    schedule = read_json(folder / SCHEDULER_CONFIG, _SchedulerFile)
    if text.hidden_size != unet.cross_attention_dim:
        raise CheckpointError(
            f"{folder}: the text encoder is {text.hidden_size} wide and the UNet reads {unet.cross_attention_dim}; "
            "they are of different checkpoints"
        )
    defaults = GenerationDefaults()
    if (folder / GENERATION_CONFIG).exists():
        defaults = GenerationDefaults(**read_json(folder / GENERATION_CONFIG, _GenerationFile).model_dump())
    return ModelConfig(
        unet=UNetConfig(
            block_out_channels=unet.block_out_channels,
            attention=unet.attention,
            layers_per_block=unet.layers_per_block,
            attention_head_dim=unet.attention_head_dim,
            cross_attention_dim=unet.cross_attention_dim,
            norm_num_groups=unet.norm_num_groups,
        ),
        autoencoder=AutoencoderConfig(
            block_out_channels=autoencoder.block_out_channels,
            layers_per_block=autoencoder.layers_per_block,
            norm_num_groups=autoencoder.norm_num_groups,
            mid_block_attention=autoencoder.mid_block_add_attention,
            scaling_factor=autoencoder.scaling_factor,
        ),
        text_encoder=TextEncoderConfig(
            vocab_size=text.vocab_size,
            context_length=text.max_position_embeddings,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            layers=text.num_hidden_layers,
            mlp_width=text.intermediate_size,
        ),
        schedule=ScheduleConfig(schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end),
        defaults=defaults,
    )


def config_files(config: ModelConfig) -> dict[str, str]:
    """The JSON files of this layout, by path. diffusers and transformers read them as their own."""
    unet, autoencoder, text, schedule = config.unet, config.autoencoder, config.text_encoder, config.schedule
    files: dict[str, dict[str, object]] = {
        "model_index.json": {
            "_class_name": "TextToVideoSDPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet3DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        UNET_CONFIG: _UNetFile.must_be
        | {
            "block_out_channels": unet.block_out_channels,
            "down_block_types": ["CrossAttnDownBlock3D" if has else "DownBlock3D" for has in unet.attention],
            "up_block_types": ["CrossAttnUpBlock3D" if has else "UpBlock3D" for has in reversed(unet.attention)],
            "layers_per_block": unet.layers_per_block,
            "cross_attention_dim": unet.cross_attention_dim,
            "attention_head_dim": unet.attention_head_dim,
            "norm_num_groups": unet.norm_num_groups,
            "sample_size": config.defaults.width // 8,
        },
        AUTOENCODER_CONFIG: _AutoencoderFile.must_be
        | {
            "block_out_channels": autoencoder.block_out_channels,
            "layers_per_block": autoencoder.layers_per_block,
            "norm_num_groups": autoencoder.norm_num_groups,
            "scaling_factor": autoencoder.scaling_factor,
            "mid_block_add_attention": autoencoder.mid_block_attention,
        },
        TEXT_ENCODER_CONFIG: {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_act": "gelu",
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "projection_dim": text.width,
        },
        SCHEDULER_CONFIG: {
            "_class_name": "DDIMScheduler",
            "beta_start": schedule.beta_start,
            "beta_end": schedule.beta_end,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": schedule.num_train_timesteps,
            "prediction_type": "epsilon",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
        GENERATION_CONFIG: dataclasses.asdict(config.defaults),
    }
    return {path: json.dumps(content, indent=2) + "\n" for path, content in files.items()}


class _ConfigFile(BaseModel):
    """A network's JSON file: the sizes we read, and `must_be`, the settings that this implementation is built for.

    Other settings are accepted where they are switched off, so that no unknown feature is silently left out.
    """

    model_config = ConfigDict(extra="allow")
    must_be: ClassVar[dict[str, object]] = {}
    may_be_anything: ClassVar[set[str]] = set()

    @model_validator(mode="after")
    def _refuse_other_kinds(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            if key in self.must_be:
                if value != self.must_be[key]:
                    raise ValueError(f"{key} is {value!r}, must be {self.must_be[key]!r}")
            elif not key.startswith("_") and key not in self.may_be_anything and value not in (None, False):
                raise ValueError(f"{key} is {value!r}, a setting that is not known here")
        return self


class _UNetFile(_ConfigFile):
    must_be = {
        "_class_name": "UNet3DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    }
    may_be_anything = {"sample_size"}
    block_out_channels: tuple[PositiveInt, ...]
    down_block_types: tuple[Literal["CrossAttnDownBlock3D", "DownBlock3D"], ...]
    up_block_types: tuple[Literal["CrossAttnUpBlock3D", "UpBlock3D"], ...]
    layers_per_block: PositiveInt
    cross_attention_dim: PositiveInt
    attention_head_dim: PositiveInt
    norm_num_groups: PositiveInt = 32

    @model_validator(mode="after")
    def _channels_fall_into_groups(self) -> Self:
        _check_groups(self.norm_num_groups, self.block_out_channels)
        return self

    @model_validator(mode="after")
    def _the_way_up_mirrors_the_way_down(self) -> Self:
        up = tuple(kind == "CrossAttnUpBlock3D" for kind in reversed(self.up_block_types))
        if not len(self.block_out_channels) == len(up) or up != self.attention:
            raise ValueError("up_block_types must mirror down_block_types, one of each for every resolution")
        return self

    @property
    def attention(self) -> tuple[bool, ...]:
        return tuple(kind == "CrossAttnDownBlock3D" for kind in self.down_block_types)


class _AutoencoderFile(_ConfigFile):
    must_be = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
    may_be_anything = {"sample_size", "force_upcast"}
    block_out_channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    layers_per_block: PositiveInt
    norm_num_groups: PositiveInt = 32
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _channels_fall_into_groups(self) -> Self:
        _check_groups(self.norm_num_groups, self.block_out_channels)
        return self


class _TextEncoderFile(BaseModel):
    hidden_act: Literal["gelu"]
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_hidden_layers: PositiveInt
    vocab_size: PositiveInt = 49408
    max_position_embeddings: PositiveInt = 77

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads")
        return self


class _SchedulerFile(BaseModel):
    """Only how the model was trained. How it is sampled is the request's choice."""

    beta_start: float
    beta_end: float
    beta_schedule: Literal["scaled_linear"]
    num_train_timesteps: Literal[1000]
    prediction_type: Literal["epsilon"] = "epsilon"
    trained_betas: None = None
    rescale_betas_zero_snr: Literal[False] = False


class _GenerationFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    sampler: SamplerName
    strength: float


def _check_groups(groups: int, channels: tuple[int, ...]) -> None:
    if any(count % groups for count in channels):
        raise ValueError(f"all of block_out_channels {channels} must be multiples of norm_num_groups {groups}")
