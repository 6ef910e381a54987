"""The demo's data are what their captions say, its measuring sees what is there, and its training can be stopped."""

import random
import time
import tomllib
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t2v_core.demo.captions import plain_caption, random_caption
from t2v_core.demo.drawing import NUM_FRAMES, SIDE, draw_scenes, draw_with_paths
from t2v_core.demo.measuring import look_at
from t2v_core.demo.model import CONFIG
from t2v_core.demo.scenes import (
    COLOURS,
    MOTIONS,
    SHAPES,
    Figure,
    Scene,
    held_out_scenes,
    random_scene,
    training_scene,
)
from t2v_core.demo.train import Recipe, train
from t2v_core.demo.training_run import OutOfTime
from t2v_core.weights import open_checkpoint

OPPOSITE = {"left": "right", "up": "down", "up_left": "down_right", "up_right": "down_left", "growing": "shrinking"}
OPPOSITE |= {after: before for before, after in OPPOSITE.items()}


def test_a_scene_is_never_both_trained_on_and_held_out():
    draw = random.Random(0)
    trained = [training_scene(draw) for _ in range(3000)]
    assert not any(scene.is_held_out for scene in trained)
    held_out = held_out_scenes(300)
    assert all(scene.is_held_out for scene in held_out)
    assert len(set(held_out)) == 300
    share = sum(random_scene(draw).is_held_out for _ in range(3000)) / 3000
    assert 0.06 < share < 0.12


def test_training_shows_every_colour_shape_and_motion_and_sometimes_two_figures():
    draw = random.Random(0)
    scenes = [training_scene(draw) for _ in range(2000)]
    figures = [figure for scene in scenes for figure in scene.figures]
    assert {figure.shape for figure in figures} == set(SHAPES)
    assert {figure.colour for figure in figures} == {scene.background for scene in scenes} == set(COLOURS)
    assert {figure.motion for figure in figures} == set(MOTIONS)
    assert 0.05 < sum(len(scene.figures) == 2 for scene in scenes) / len(scenes) < 0.2
    assert all(figure.colour != scene.background for scene in scenes for figure in scene.figures)


def test_a_caption_names_what_is_seen_in_many_ways():
    scene = Scene((Figure("star", "orange", "up_left", "large"),), "gray")
    assert plain_caption(scene) == "a large orange star moving diagonally up and left on a gray background"
    draw = random.Random(0)
    captions = {random_caption(scene, draw) for _ in range(200)}
    assert len(captions) > 100
    for caption in captions:
        assert all(word in caption for word in ("orange", "star", "up", "left", "gray"))
        assert "a orange" not in caption


@pytest.fixture(scope="module")
def drawn():
    scenes = held_out_scenes(40, seed=7)
    return scenes, draw_scenes(scenes, random.Random(7))


def test_videos_are_drawn_as_the_checkpoint_makes_them(drawn):
    _, videos = drawn
    assert videos.shape == (40, NUM_FRAMES, SIDE, SIDE, 3)
    defaults = CONFIG.defaults
    assert (defaults.num_frames, defaults.height, defaults.width) == (NUM_FRAMES, SIDE, SIDE)


def test_measuring_sees_what_was_drawn(drawn):
    for scene, video in zip(*drawn, strict=True):
        (figure,) = scene.figures
        seen = look_at(video)
        assert (seen.background, seen.colour) == (scene.background, figure.colour), plain_caption(scene)
        assert (seen.shape, seen.motion) == (figure.shape, figure.motion), plain_caption(scene)


def test_measuring_a_video_backwards_sees_the_opposite_motion(drawn):
    backwards = [(scene, video) for scene, video in zip(*drawn, strict=True) if scene.figures[0].motion in OPPOSITE]
    assert len(backwards) > 10
    for scene, video in backwards:
        assert look_at(video.flip(0)).motion == OPPOSITE[scene.figures[0].motion]


def test_measuring_an_empty_video_sees_no_figure():
    seen = look_at(torch.full((NUM_FRAMES, SIDE, SIDE, 3), 250, dtype=torch.uint8))
    assert (seen.background, seen.colour, seen.shape, seen.motion) == ("white", None, None, None)


RECIPE = Recipe(
    autoencoder_videos=3,
    autoencoder_steps=3,
    autoencoder_batch=2,
    videos=3,
    steps=2,
    forward_steps=1,
    batch=2,
    warmup_steps=2,
)
NUM_STEPS = RECIPE.autoencoder_steps + RECIPE.steps
CPU = torch.device("cpu")


def weights_of(folder):
    files = sorted(folder.glob("*/*.safetensors"))
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def test_a_training_stopped_after_every_step_ends_as_one_that_was_not(tmp_path):
    train(tmp_path / "straight", tmp_path / "work_1", RECIPE, CPU)
    stops = 0
    while not (tmp_path / "stopped" / "model_index.json").exists():
        try:
            train(tmp_path / "stopped", tmp_path / "work_2", RECIPE, CPU, deadline=time.monotonic())
        except OutOfTime:
            stops += 1
        assert stops <= NUM_STEPS
    assert stops == NUM_STEPS
    straight, stopped = weights_of(tmp_path / "straight"), weights_of(tmp_path / "stopped")
    assert straight.keys() == stopped.keys()
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)

    assert open_checkpoint(tmp_path / "straight").config.unet == CONFIG.unet
    embedding = straight["text_encoder.text_model.embeddings.token_embedding.weight"]
    assert 20 < (embedding.abs().sum(dim=1) > 0).sum() < 300  # tokens never seen keep rows of zeros
    assert all(tensor.isfinite().all() for tensor in straight.values())


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "t2v_core" / "demo"
SHIPPED = [path for path in (PACKAGE / "checkpoint").rglob("*") if path.is_file()]


def test_the_checkpoint_is_small_enough_to_come_with_the_package():
    assert sum(path.stat().st_size for path in SHIPPED) <= 36e6
    # Most of the token embeddings are rows of zeros: on the way in a wheel they cost nothing.
    assert sum(len(zlib.compress(path.read_bytes())) for path in SHIPPED) <= 23.5e6


def test_an_installation_has_the_whole_checkpoint_and_its_model_card():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["t2v_core.demo"]
    installed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert len(SHIPPED) >= 8
    assert {*SHIPPED, PACKAGE / "README.md"} <= installed


def test_the_checkpoint_has_the_sizes_of_the_training():
    shipped = open_checkpoint("demo").config
    assert (shipped.unet, shipped.text_encoder, shipped.schedule, shipped.defaults) == (
        CONFIG.unet,
        CONFIG.text_encoder,
        CONFIG.schedule,
        CONFIG.defaults,
    )


def test_the_paths_say_where_the_figures_are():
    scene = Scene((Figure("circle", "red", "down_right", "small"),), "white")
    ((frames,), (paths,)) = draw_with_paths([scene], random.Random(0))
    is_red = (frames[..., 2] < 128).float()
    places = (torch.arange(SIDE) + 0.5) / SIDE
    x, y, radius, _ = paths[0].unbind(-1)
    torch.testing.assert_close((is_red.sum(dim=1) @ places) / is_red.sum(dim=(1, 2)), x, atol=0.005, rtol=0)
    torch.testing.assert_close((is_red.sum(dim=2) @ places) / is_red.sum(dim=(1, 2)), y, atol=0.005, rtol=0)
    torch.testing.assert_close((is_red.mean(dim=(1, 2)) / torch.pi).sqrt(), radius, atol=0.005, rtol=0)
    assert not paths[1].any()
