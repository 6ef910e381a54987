"""The diffusers layout: a folder for each network, with its sizes in a JSON file beside its weights.

Our modules carry this layout's names, but for the text tower, which is OpenCLIP's.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

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
from t2v_core.text_encoder import PADDING_ID
from t2v_core.weights.checkpoint import Checkpoint
from t2v_core.weights.files import read_json, read_tensors

MARKER = "model_index.json"
GENERATION_CONFIG = "generation_config.json"  # ours: the defaults of a checkpoint whose sizes are not well known
UNET_CONFIG = "unet/config.json"
AUTOENCODER_CONFIG = "vae/config.json"
TEXT_ENCODER_CONFIG = "text_encoder/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"

_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_PICKLE_STEMS = _STEMS | {"text_encoder": "pytorch_model"}


def needed_files(names: Sequence[str], half: bool) -> list[str]:
    """Of all files in a repository, those that loading reads."""
    configs = [UNET_CONFIG, AUTOENCODER_CONFIG, TEXT_ENCODER_CONFIG, SCHEDULER_CONFIG]
    needed = [MARKER, *configs, *(name for name in (GENERATION_CONFIG,) if name in names)]
    for network in _STEMS:
        chosen = _weights_file(names, network, half)
        needed.append(chosen)
        if chosen.endswith(".index.json"):
            kind = "safetensors" if ".safetensors." in chosen else "bin"
            needed += [n for n in names if re.fullmatch(rf"{network}/[^/]*-\d+-of-\d+[^/]*\.{kind}", n)]
    return needed


def open_folder(folder: Path, name: str, half: bool) -> Checkpoint:
    """The checkpoint in this folder. Raises CheckpointError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    paths = {network: folder / _weights_file(names, network, half) for network in _STEMS}
    return Checkpoint(
        name,
        _read_config(folder),
        read_unet=lambda: read_tensors(paths["unet"]),
        read_autoencoder=lambda: _current_attention_names(read_tensors(paths["vae"])),
        read_text_encoder=lambda: text_tower_from_clip(read_tensors(paths["text_encoder"])),
    )


def _weights_file(names: Sequence[str], network: str, half: bool) -> str:
    """The best file of a network's weights: safetensors before pickles, and of the wanted precision if there is one."""
    variants = [".fp16", ""] if half else ["", ".fp16"]
    candidates = [
        f"{network}/{stem}{variant}{kind}{index}" if not index else f"{network}/{stem}{kind}.index{variant}.json"
        for stem, kind in ((_STEMS[network], ".safetensors"), (_PICKLE_STEMS[network], ".bin"))
        for variant in variants
        for index in ("", ".index.json")
    ]
    for candidate in candidates:
        if candidate in names:
            return candidate
    raise CheckpointError(
        f"{network}/ holds no {_STEMS[network]}.safetensors and no {_PICKLE_STEMS[network]}.bin; "
        "the checkpoint is incomplete: fetch it again"
    )


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
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[Literal["CrossAttnDownBlock3D", "DownBlock3D"], ...]
    up_block_types: tuple[Literal["CrossAttnUpBlock3D", "UpBlock3D"], ...]
    layers_per_block: int
    cross_attention_dim: int
    attention_head_dim: int
    norm_num_groups: int = 32
    sample_size: int | None = None

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
    block_out_channels: tuple[int, int, int, int]
    layers_per_block: int
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True


class _TextEncoderFile(BaseModel):
    hidden_act: Literal["gelu"]
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int = 49408
    max_position_embeddings: int = 77


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


def _read_config(folder: Path) -> ModelConfig:
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


_OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _current_attention_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Autoencoders saved by diffusers before 0.17 name the parts of their attention in another way."""

    def rename(name: str) -> str:
        found = re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\..*)", name)
        return f"{found[1]}{_OLD_ATTENTION_NAMES[found[2]]}{found[3]}" if found else name

    return {rename(name): tensor for name, tensor in tensors.items()}


# transformers' CLIPTextModel -> OpenCLIP's TextTransformer, but for the attention's input projections.
_TEXT_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_TEXT_LAYER_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def text_tower_from_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIPTextModel's tensors under our text encoder's names: query, key and value become one tensor."""
    # transformers 5 writes no "text_model." prefix; the position ids of old files are only 0, 1, 2, ...
    ours: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for stored_name, tensor in tensors.items():
        name = stored_name.removeprefix("text_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "embeddings.position_ids":
            continue
        if name in _TEXT_NAMES:
            ours[f"tower.{_TEXT_NAMES[name]}"] = tensor
        elif layer and layer[2] in _TEXT_LAYER_NAMES:
            ours[f"tower.transformer.resblocks.{layer[1]}.{_TEXT_LAYER_NAMES[layer[2]]}.{layer[3]}"] = tensor
        elif layer and (part := re.fullmatch(r"self_attn\.([qkv])_proj", layer[2])):
            fused = f"tower.transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"
            qkv.setdefault(fused, {})[part[1]] = tensor
        else:
            ours[stored_name] = tensor  # reported as unexpected
    for fused, parts in qkv.items():
        missing = sorted(set("qkv") - set(parts))
        if missing:
            raise CheckpointError(f"text_encoder: {missing[0]}_proj is missing for {fused}; fetch the checkpoint again")
        ours[fused] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return ours


def text_tower_to_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back: our text encoder's tensors under CLIPTextModel's names."""
    names = {ours: theirs for theirs, ours in _TEXT_NAMES.items()}
    layer_names = {ours: theirs for theirs, ours in _TEXT_LAYER_NAMES.items()}
    clip: dict[str, Tensor] = {}
    for our_name, tensor in tensors.items():
        name = our_name.removeprefix("tower.")
        if name in names:
            clip[f"text_model.{names[name]}"] = tensor
            continue
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        assert layer, our_name
        prefix = f"text_model.encoder.layers.{layer[1]}"
        if layer[2] == "attn.in_proj":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                clip[f"{prefix}.self_attn.{part}_proj.{layer[3]}"] = rows
        else:
            clip[f"{prefix}.{layer_names[layer[2]]}.{layer[3]}"] = tensor
    return clip


def config_files(config: ModelConfig) -> dict[str, str]:
    """The JSON files of this layout, by path. diffusers and transformers read them as their own."""
    unet, autoencoder, text, schedule = config.unet, config.autoencoder, config.text_encoder, config.schedule
    files: dict[str, dict[str, object]] = {
        MARKER: {
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


def tokenizer_files(context_length: int) -> dict[str, str]:
    """OpenCLIP's vocabulary as the files of a CLIPTokenizer, for diffusers: we do not read them."""
    from open_clip.tokenizer import SimpleTokenizer

    bpe = SimpleTokenizer(context_length=context_length)
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    start, end = special.values()
    padding = next(token for token, number in bpe.encoder.items() if number == PADDING_ID)
    merges = [" ".join(pair) for pair in sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__) if pair]
    tokens = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": padding}
    tokenizer_config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, **tokens}
    return {
        "tokenizer/vocab.json": json.dumps({special.get(token, token): i for token, i in bpe.encoder.items()}),
        "tokenizer/merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "tokenizer/tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
        "tokenizer/special_tokens_map.json": json.dumps(tokens, indent=2) + "\n",
    }
