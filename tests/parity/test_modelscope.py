"""A checkpoint in ModelScope's own files gives what ModelScope's own code gives, and converts without loss."""

import shutil

import modelscope_checkpoint
import pytest
import torch
from einops import rearrange
from references import modelscope_module, relative_error

from t2v_core.errors import CheckpointError
from t2v_core.pipeline import load
from t2v_core.text_encoder import Tokenizer
from t2v_core.weights import convert, load_autoencoder, load_text_encoder, load_unet, open_checkpoint
from t2v_core.weights.checkpoint import NETWORKS
from t2v_core.weights.modelscope_layout import needed_files

SIZES = modelscope_checkpoint.SMALL
CPU = torch.device("cpu")
PROMPT = "A panda eating bamboo on a rock."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modelscope") / "model"
    modelscope_checkpoint.write(folder, SIZES)
    return folder


def test_the_unet_is_that_of_modelscope(folder):
    ours = load_unet(open_checkpoint(folder), CPU, torch.float32)
    reference = modelscope_checkpoint.unet(SIZES)
    latents = torch.randn(2, 4, 5, 16, 8)
    timesteps, text_embeds = torch.tensor([981, 1]), torch.randn(2, 77, SIZES["unet_context_dim"])
    assert relative_error(ours(latents, timesteps, text_embeds), reference(latents, timesteps, text_embeds)) <= 1e-5


def test_the_autoencoder_is_that_of_modelscope(folder):
    ours = load_autoencoder(open_checkpoint(folder), CPU, torch.float32)
    reference = modelscope_checkpoint.autoencoder(SIZES)
    latents = torch.randn(4, 2, 4, 6)
    frames = torch.cat(list(ours.decode_chunks(latents)))
    assert relative_error(frames, reference.decode(rearrange(latents, "c f h w -> f c h w") / 0.18215)) <= 1e-5
    video = torch.randn(1, 3, 2, 32, 48)
    posterior = reference.encode(rearrange(video, "1 c f h w -> f c h w"))
    mean = rearrange(posterior.mean, "f c h w -> 1 c f h w") * 0.18215
    assert relative_error(ours.encode(video).mean, mean) <= 1e-5


def test_the_text_encoder_stops_before_the_last_layer_as_modelscope_does(folder):
    ours = load_text_encoder(open_checkpoint(folder), CPU, torch.float32)
    clip = modelscope_checkpoint.clip(SIZES)
    ids = Tokenizer(77)(PROMPT)
    x = clip.token_embedding(ids) + clip.positional_embedding
    for block in clip.transformer.resblocks[:-1]:
        x = block(x, attn_mask=clip.attn_mask)
    assert relative_error(ours(ids), clip.ln_final(x)) <= 1e-5


def test_fifty_steps_of_guided_ddim_are_those_of_modelscope(folder):
    pipeline = load(folder, device="cpu", dtype=torch.float32)
    params = pipeline.params(
        PROMPT, seed=5, width=64, height=64, num_frames=3, num_inference_steps=50, sampler="ddim", guidance_scale=9.0
    )
    conditioning = pipeline.encode_prompt(params)
    *_, last = pipeline.denoise(params)

    module = modelscope_module("diffusion")
    betas = module.beta_schedule("linear_sd", 1000, init_beta=0.00085, last_beta=0.0120)
    diffusion = module.GaussianDiffusion(
        betas=betas, mean_type="eps", var_type="fixed_small", loss_type="mse", rescale_timesteps=False
    )
    latents = diffusion.ddim_sample_loop(
        noise=torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5)),
        model=modelscope_checkpoint.unet(SIZES),
        model_kwargs=[{"y": conditioning.prompt[None]}, {"y": conditioning.negative[None]}],
        guide_scale=9.0,
        ddim_timesteps=50,
        eta=0.0,
    )
    assert relative_error(last.latents, latents[0]) <= 1e-5


def test_converted_to_the_diffusers_layout_it_is_the_same_model(folder, tmp_path):
    convert(open_checkpoint(folder), tmp_path / "converted", torch.float32)
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "converted")
    assert after.config == before.config
    for load_network in (load_unet, load_autoencoder, load_text_encoder):
        ours = load_network(before, CPU, torch.float32).state_dict()
        converted = load_network(after, CPU, torch.float32).state_dict()
        assert ours.keys() == converted.keys()
        assert all(torch.equal(ours[name], converted[name]) for name in ours)


def test_only_the_files_of_the_networks_that_are_asked_for_are_needed(folder, tmp_path):
    unet, text = "text2video_pytorch_model.pth", "open_clip_pytorch_model.bin"
    names = ["configuration.json", unet, "VQGAN_autoencoder.pth", text]
    assert needed_files(names, False, NETWORKS) == names
    assert needed_files(names, False, ()) == ["configuration.json"]
    assert needed_files(names, False, ["text_encoder"]) == ["configuration.json", text]
    with pytest.raises(CheckpointError, match=f"{text} is not in the repository"):
        needed_files(names[:-1], False, ["text_encoder"])

    whole = open_checkpoint(folder)
    ignore = shutil.ignore_patterns(unet, "VQGAN_autoencoder.pth")
    rest = shutil.copytree(folder.parent, tmp_path / "rest", ignore=ignore) / folder.name
    opened = open_checkpoint(rest, networks=["text_encoder"])
    assert (opened.config.text_encoder, opened.config.unet) == (whole.config.text_encoder, whole.config.unet)
    assert opened.read("text_encoder")
    assert open_checkpoint(rest, networks=()).config.defaults == whole.config.defaults
    with pytest.raises(CheckpointError, match="opened for text_encoder only; name unet"):
        opened.read("unet")
    with pytest.raises(CheckpointError, match=r"VQGAN_autoencoder\.pth: no such file"):
        open_checkpoint(rest)
