"""The diffusers layout: a folder for each network, with its sizes in a JSON file beside its weights.

Our modules carry this layout's names, but for the text tower, which is OpenCLIP's.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from t2v_core.errors import CheckpointError
from t2v_core.text_encoder import PADDING_ID
from t2v_core.weights.checkpoint import Checkpoint, NetworkName, TensorReader
from t2v_core.weights.diffusers_config import GENERATION_CONFIG, NETWORK_CONFIGS, read_config
from t2v_core.weights.files import is_index, read_tensors

MARKER = "model_index.json"

_FOLDERS: dict[NetworkName, str] = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}
_STEMS: dict[NetworkName, str] = {
    "unet": "diffusion_pytorch_model",
    "autoencoder": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_PICKLE_STEMS: dict[NetworkName, str] = _STEMS | {"text_encoder": "pytorch_model"}


def needed_files(names: Sequence[str], half: bool, networks: Collection[NetworkName]) -> list[str]:
    """Of all files in a repository, those that loading these networks reads."""
    needed = [MARKER, *NETWORK_CONFIGS, *(name for name in (GENERATION_CONFIG,) if name in names)]
    for network in networks:
        chosen = _weights_file(names, network, half)
        needed.append(chosen)
        if is_index(chosen):
            shards = _shards(names, chosen)
            if not shards:
                raise CheckpointError(f"{chosen}: not all shards that it lists are there; fetch the checkpoint again")
            needed += shards
    return needed


def open_folder(folder: Path, name: str, half: bool, networks: Collection[NetworkName]) -> Checkpoint:
    """The checkpoint in this folder, with readers of these networks. Raises CheckpointError."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    paths = {network: folder / _weights_file(names, network, half) for network in networks}
    readers: dict[NetworkName, TensorReader] = {
        "unet": lambda: read_tensors(paths["unet"]),
        "autoencoder": lambda: _current_attention_names(read_tensors(paths["autoencoder"])),
        "text_encoder": lambda: text_tower_from_clip(read_tensors(paths["text_encoder"])),
    }
    return Checkpoint(name, read_config(folder), {network: readers[network] for network in networks})


def _shards(names: Sequence[str], index: str) -> list[str]:
    """The files that an index lists, if all are there: a.safetensors.index.fp16.json, a.fp16-00001-of-00002...

    Told by their names, since the index itself may not be here yet.
    """
    found = re.fullmatch(r"(.+)(\.safetensors|\.bin)\.index(\.\w+)?\.json", index)
    assert found, index
    stem, kind, variant = re.escape(found[1]), re.escape(found[2]), re.escape(found[3] or "")
    matches = [re.fullmatch(rf"{stem}{variant}-\d+-of-(\d+){kind}", name) for name in names]
    totals = {match[0]: int(match[1]) for match in matches if match}
    num_held = Counter(totals.values())
    return [name for name, total in totals.items() if num_held[total] == total]


def _weights_file(names: Sequence[str], network: NetworkName, half: bool) -> str:
    """The file of a network's weights to read: the wanted precision goes first, then safetensors before pickles.

    An index whose shards are not all there is taken where there is nothing else.
    """
    folder = _FOLDERS[network]
    found: list[str] = []
    for variant in (".fp16", "") if half else ("", ".fp16"):
        for stem, kind in ((_STEMS[network], ".safetensors"), (_PICKLE_STEMS[network], ".bin")):
            for candidate in (f"{folder}/{stem}{variant}{kind}", f"{folder}/{stem}{kind}.index{variant}.json"):
                if candidate in names:
                    found.append(candidate)
    if found:
        return next((name for name in found if not is_index(name) or _shards(names, name)), found[0])
    raise CheckpointError(
        f"{folder}/ holds no {_STEMS[network]}.safetensors and no {_PICKLE_STEMS[network]}.bin; "
        "the checkpoint is incomplete: fetch it again"
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
