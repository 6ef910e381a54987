"""How the demo checkpoint is made: its autoencoder first, then its UNet and text encoder together.

    python -m t2v_core.demo.train CHECKPOINT_FOLDER --work WORK_FOLDER

Everything is drawn, trained and written from one seed. It can be stopped at any time, also by --max-seconds: the same
command goes on where the last state in the work folder ends. On one H100 the autoencoder took 3 minutes, drawing and
encoding the videos one, and a step of the denoiser 0.064 s: 18 minutes for all.
"""

import argparse
import dataclasses
import logging
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from t2v_core.autoencoder import Autoencoder
from t2v_core.config import ModelConfig
from t2v_core.demo.captions import random_caption
from t2v_core.demo.drawing import draw_with_paths
from t2v_core.demo.model import CONFIG
from t2v_core.demo.scenes import BACKWARD, training_scene
from t2v_core.demo.training_run import Batch, LearningSchedule, TrainingRun, save_state
from t2v_core.layers import conv_frames
from t2v_core.schedule import Schedule
from t2v_core.text_encoder import TextEncoder, Tokenizer
from t2v_core.unet3d import UNet3D
from t2v_core.weights.convert import write_autoencoder, write_config, write_text_encoder, write_unet

logger = logging.getLogger(__name__)

_CAPTIONS_A_VIDEO = 3
_PATH_VALUES = 8  # of two figures: centre x and y, radius, angle


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the result, beside the sizes of the networks."""

    seed: int = 0
    autoencoder_videos: int = 6_000
    autoencoder_steps: int = 3_500
    autoencoder_batch: int = 128  # frames
    autoencoder_learning_rate: float = 1e-3
    kl_weight: float = 1e-5
    videos: int = 40_000
    steps: int = 13_000
    forward_steps: int = 3_000  # the first ones, which see no motion that is another one backwards
    batch: int = 32  # videos
    learning_rate: float = 7e-4
    warmup_steps: int = 300
    unprompted_share: float = 0.1  # trained without a prompt, for guidance
    offset_noise: float = 0.1  # else the mean colour is never learnt: even the last timestep shows it
    path_weight: float = 0.2
    ema_decay: float = 0.999


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="where the finished checkpoint goes")
    parser.add_argument("--work", type=Path, required=True, help="where the state of the training is kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    for field in dataclasses.fields(Recipe):
        parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    recipe = Recipe(**{field.name: arguments[field.name] for field in dataclasses.fields(Recipe)})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(
        arguments["checkpoint"],
        arguments["work"],
        recipe,
        torch.device(arguments["device"]),
        deadline=time.monotonic() + arguments["max_seconds"],
    )


def train(
    checkpoint: Path,
    work: Path,
    recipe: Recipe,
    device: torch.device,
    config: ModelConfig = CONFIG,
    deadline: float = float("inf"),
) -> None:
    """Train, or go on training, and write the checkpoint. Raises OutOfTime at the deadline (of time.monotonic)."""
    work.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(work / "autoencoder.pt", recipe, device, config, deadline)
    unet, text_encoder = train_denoiser(work, autoencoder, recipe, device, config, deadline)
    write_config(checkpoint, dataclasses.replace(config, autoencoder=autoencoder.config))
    for network, write in ((unet, write_unet), (autoencoder, write_autoencoder), (text_encoder, write_text_encoder)):
        write(checkpoint, {name: tensor.cpu() for name, tensor in network.half().state_dict().items()})


def train_autoencoder(
    state_path: Path, recipe: Recipe, device: torch.device, config: ModelConfig, deadline: float
) -> Autoencoder:
    """Frames to latents and back, to the mean square; then the latents are scaled to unit variance."""
    torch.manual_seed(recipe.seed)
    autoencoder = Autoencoder(dataclasses.replace(config.autoencoder, scaling_factor=1.0)).to(device, _dtype(device))
    schedule = LearningSchedule(
        recipe.autoencoder_steps, recipe.autoencoder_learning_rate, recipe.warmup_steps, recipe.ema_decay
    )
    run = TrainingRun(state_path, autoencoder, schedule, seed=recipe.seed, deadline=deadline)
    if not run.is_finished:
        frames = rearrange(_draw(recipe.autoencoder_videos, recipe.seed, device).frames, "v f h w c -> (v f) c h w")

        def draw(generator: torch.Generator) -> Batch:
            rows = torch.randint(len(frames), (recipe.autoencoder_batch,), generator=generator, device=device)
            pixels = _pixels(frames[rows])
            shape = (len(rows), config.autoencoder.latent_channels, pixels.shape[2] // 8, pixels.shape[3] // 8)
            return pixels, torch.randn(shape, generator=generator, device=device)

        def loss_of(batch: Batch) -> Tensor:
            pixels, noise = batch
            return _autoencoder_loss(autoencoder, pixels, noise, recipe.kl_weight)

        run.train(draw, loss_of)
        autoencoder.float().load_state_dict(run.averaged)
        psnr, std = _quality(autoencoder, frames[:: max(1, len(frames) // 512)])
        logger.info("autoencoder: psnr %.1f dB, latents' std %.3f", psnr, std)
        run.finish({"scaling_factor": 1.0 / std, "psnr": psnr})
    autoencoder.float().load_state_dict(run.averaged)
    autoencoder.config = dataclasses.replace(config.autoencoder, scaling_factor=run.notes["scaling_factor"])
    return autoencoder.requires_grad_(False).eval()


def _autoencoder_loss(autoencoder: Autoencoder, pixels: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    dtype = autoencoder.quant_conv.weight.dtype
    encoded = autoencoder.encoder(rearrange(pixels.to(dtype), "b c h w -> 1 b h w c").contiguous())
    moments = rearrange(conv_frames(encoded, autoencoder.quant_conv), "1 b h w c -> b c h w").float()
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    latents = mean + (0.5 * log_variance).exp() * noise
    decoded = autoencoder.decode_frames(latents.to(dtype)).float()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1.0 - log_variance).mean()
    return F.mse_loss(decoded, pixels) + 0.1 * F.l1_loss(decoded, pixels) + kl_weight * kl


@torch.no_grad()
def _quality(autoencoder: Autoencoder, frames: Tensor) -> tuple[float, float]:
    """PSNR in dB of frames that were encoded and decoded, and the standard deviation of their latents."""
    pixels = _pixels(frames)
    latents = autoencoder.encode(rearrange(pixels, "f c h w -> 1 c f h w")).mean
    decoded = torch.cat(list(autoencoder.decode_chunks(latents[0]))).clamp(-1, 1)
    error = ((decoded - pixels) / 2).square().mean()
    return (-10 * error.log10()).item(), latents.std().item()


def train_denoiser(
    work: Path,
    autoencoder: Autoencoder,
    recipe: Recipe,
    device: torch.device,
    config: ModelConfig,
    deadline: float,
) -> tuple[UNet3D, TextEncoder]:
    """UNet and text encoder together, to predict the noise in latents (Ho et al. 2020).

    What a figure does is a small part of that loss. It shows in the last timesteps, where an error of eps is little of
    one of x0, and takes the text and the number of the frame at once, which nothing tells but the edges of convolutions
    over time. As long as the network reads either alone it gains nothing, since there are as many videos of a motion
    as of the same one backwards: 10,000 steps left the words of motion unread and the network blind to the direction of
    time. So the first steps see things go right, down or grow but never the other way, which teaches the direction of
    time without a word. A linear layer, thrown away afterwards, reads from the UNet's middle where each figure is in
    each frame, and errors of eps count sigma / alpha times where that is more than once.
    """
    torch.manual_seed(recipe.seed + 1)
    unet, text_encoder = UNet3D(config.unet), TextEncoder(config.text_encoder)
    _begin_as_identity(unet)
    # A token that is never seen keeps its row of zeros, which compresses to nothing.
    nn.init.zeros_(text_encoder.tower.token_embedding.weight)
    path_head = nn.Linear(config.unet.block_out_channels[-1], _PATH_VALUES)
    learning = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder, "path_head": path_head})
    learning.to(device, _dtype(device))
    middle: list[Tensor] = []
    reading = unet.mid_block.register_forward_hook(lambda _, __, out: middle.append(out))
    tokenizer = Tokenizer(config.text_encoder.context_length)
    videos = _encoded_videos(work / "videos.pt", autoencoder, tokenizer, recipe, device)
    latents, tokens, paths = videos["latents"], videos["tokens"], videos["paths"]
    forward = videos["is_forward"].nonzero()[:, 0]
    _draw_seen_embeddings(text_encoder, tokens)
    empty = tokenizer("").to(device)
    alpha, sigma = (part.float().to(device) for part in Schedule(config.schedule).alpha_sigma(torch.arange(1000)))

    def draw(generator: torch.Generator) -> Batch:
        b = recipe.batch
        rows = torch.randint(len(latents), (b,), generator=generator, device=device)
        if run.step < recipe.forward_steps and len(forward):  # a handful of videos may hold none
            rows = forward[rows % len(forward)]
        x0 = latents[rows].float()
        which = torch.randint(_CAPTIONS_A_VIDEO, (b,), generator=generator, device=device)
        ids = tokens[rows, which].long()
        unprompted = torch.rand(b, generator=generator, device=device) < recipe.unprompted_share
        ids = torch.where(unprompted[:, None], empty, ids)
        # The first half of a video's making decides what it shows, and is few of the timesteps: twice as often.
        t = torch.randint(1000, (b,), generator=generator, device=device)
        late = torch.randint(500, 1000, (b,), generator=generator, device=device)
        t = torch.where(torch.rand(b, generator=generator, device=device) < 0.33, late, t)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        shift = torch.randn((*x0.shape[:2], 1, 1, 1), generator=generator, device=device)
        noise = noise + recipe.offset_noise * shift
        a, s = (part[t].view(-1, 1, 1, 1, 1) for part in (alpha, sigma))
        return a * x0 + s * noise, t, ids, noise, (s / a).clamp(min=1.0), paths[rows]

    def loss_of(batch: Batch) -> Tensor:
        x, t, ids, noise, weight, path = batch
        text_embeds = text_encoder(ids)
        eps = unet(x.to(text_embeds.dtype), t, text_embeds).float()
        seen = path_head(reduce(middle.pop(), "b f h w c -> b f c", "mean")).float()
        return (weight * (eps - noise).square()).mean() + recipe.path_weight * F.mse_loss(seen, path)

    schedule = LearningSchedule(recipe.steps, recipe.learning_rate, recipe.warmup_steps, recipe.ema_decay)
    run = TrainingRun(work / "denoiser.pt", learning, schedule, seed=recipe.seed, deadline=deadline)
    if not run.is_finished:
        run.train(draw, loss_of)
        run.finish({})
    reading.remove()
    learning.float().load_state_dict(run.averaged)
    learning.requires_grad_(False).eval()
    return unet, text_encoder


def _begin_as_identity(unet: UNet3D) -> None:
    """As in the references: the last layer of each residual branch starts at zero."""
    for name, parameter in unet.named_parameters():
        if re.search(r"(resnets\.\d+\.conv2|conv4\.3|proj_out|^conv_out)\.", name):
            nn.init.zeros_(parameter)


def _draw_seen_embeddings(text_encoder: TextEncoder, tokens: Tensor) -> None:
    embedding = text_encoder.tower.token_embedding.weight
    seen = torch.unique(tokens).long()
    with torch.no_grad():
        embedding[seen] = 0.02 * torch.randn(len(seen), embedding.shape[1]).to(embedding)


class _Drawn(NamedTuple):
    """Training videos: frames, uint8 (v, f, h, w, c); where the figures are, (v, f, 8); some captions of each.

    A video is forward if no motion in it is one of BACKWARD.
    """

    frames: Tensor
    paths: Tensor
    captions: list[list[str]]
    is_forward: list[bool]


def _draw(count: int, seed: int, device: torch.device, chunk: int = 500) -> _Drawn:
    draw = random.Random(seed)
    drawn, captions, is_forward = [], [], []
    for start in range(0, count, chunk):
        scenes = [training_scene(draw) for _ in range(min(chunk, count - start))]
        drawn.append(draw_with_paths(scenes, draw, device))
        captions += [[random_caption(scene, draw) for _ in range(_CAPTIONS_A_VIDEO)] for scene in scenes]
        is_forward += [not any(figure.motion in BACKWARD for figure in scene.figures) for scene in scenes]
    frames, paths = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    x, y, radius, angle = paths.unbind(-1)
    # Nobody can tell beforehand which way a figure spins.
    values = torch.stack([x, y, 3 * radius, angle.abs() / math.pi], dim=-1)
    return _Drawn(frames, rearrange(values, "v k f values -> v f (k values)"), captions, is_forward)


@torch.no_grad()
def _encoded_videos(
    path: Path, autoencoder: Autoencoder, tokenizer: Tokenizer, recipe: Recipe, device: torch.device
) -> dict[str, Tensor]:
    """Latents (v, c, f, h, w) in half precision, tokens (v, captions, 77), paths, and which videos are forward.

    They are kept for the next start.
    """
    if path.exists():
        return torch.load(path, map_location=device, weights_only=True)
    latents, paths, captions, is_forward = [], [], [], []
    for start in range(0, recipe.videos, 500):
        drawn = _draw(min(500, recipe.videos - start), recipe.seed + 1 + start, device)
        for part in torch.split(drawn.frames, 50):
            latents.append(autoencoder.encode(rearrange(_pixels(part), "v f h w c -> v c f h w")).mean.half())
        paths.append(drawn.paths)
        captions += drawn.captions
        is_forward += drawn.is_forward
    tokens = torch.stack([torch.cat([tokenizer(caption) for caption in several]) for several in captions])
    encoded = {
        "latents": torch.cat(latents),
        "tokens": tokens.int().to(device),
        "paths": torch.cat(paths),
        "is_forward": torch.tensor(is_forward, device=device),
    }
    save_state(encoded, path)
    return encoded


def _pixels(frames: Tensor) -> Tensor:
    """uint8 to [-1, 1], as the autoencoder takes them."""
    return frames.float() / 127.5 - 1.0


def _dtype(device: torch.device) -> torch.dtype:
    """What the networks run in while they learn."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


if __name__ == "__main__":
    main()
