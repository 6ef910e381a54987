"""The two reference implementations, with the same random weights as ours."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2v_core.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig
from t2v_core.weights.diffusers_config import config_files
from t2v_core.weights.diffusers_layout import text_tower_to_clip
from t2v_core.weights.random_init import randomise

SMALL_UNET = UNetConfig(
    block_out_channels=(32, 64, 64, 96),
    layers_per_block=2,
    attention_head_dim=16,
    cross_attention_dim=48,
    norm_num_groups=8,
)
SMALL_AUTOENCODER = AutoencoderConfig(block_out_channels=(32, 64, 64, 96), layers_per_block=2, norm_num_groups=8)
SMALL_TEXT_ENCODER = TextEncoderConfig(width=128, heads=2, layers=3, mlp_width=512)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| / max |reference|."""
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def random_network(network: type[nn.Module], config: object, seed: int = 0) -> Any:
    """One of our networks with random weights, none of them zero."""
    with torch.device("meta"):
        built = network(config)
    built = randomise(built.to_empty(device="cpu"), torch.Generator().manual_seed(seed))
    return built.requires_grad_(False).eval()


def diffusers_network(class_name: str, path: str, config: ModelConfig, state_dict: dict[str, Tensor]) -> Any:
    """A network of diffusers, built from the JSON that we write, holding the very tensors of `state_dict`."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        network = getattr(diffusers, class_name).from_config(json.loads(config_files(config)[path]))
    network.load_state_dict(state_dict, assign=True)
    return network.eval()


def clip_text_model(config: ModelConfig, state_dict: dict[str, Tensor]) -> Any:
    """transformers' CLIPTextModel with our text encoder's weights."""
    transformers = pytest.importorskip("transformers")
    fields = json.loads(config_files(config)["text_encoder/config.json"])
    with torch.device("meta"):
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields))
    model = model.to_empty(device="cpu")
    model.embeddings.position_ids.copy_(torch.arange(config.text_encoder.context_length)[None])
    theirs = {name.removeprefix("text_model."): t for name, t in text_tower_to_clip(state_dict).items()}
    model.load_state_dict(theirs)
    return model.eval()


def modelscope_module(name: str) -> ModuleType:
    """One file of ModelScope's own code, loaded by itself: the package around it wants a whole framework."""
    package = importlib.util.find_spec("modelscope")
    if package is None or not package.submodule_search_locations:
        pytest.skip("modelscope is not installed")
    path = Path(package.submodule_search_locations[0]) / "models" / "multi_modal" / "video_synthesis" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"modelscope_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
