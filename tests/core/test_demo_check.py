"""The demo checkpoint draws what it is told, and the check that says so can be run by anybody."""

import logging
import sys

import av
import pytest
import torch

from t2v_core.demo import check as checking
from t2v_core.demo.check import ATTRIBUTES, check
from t2v_core.demo.scenes import held_out_scenes
from t2v_core.pipeline import load

PROMPT = "A red circle moving right on a white background."


@pytest.fixture(scope="module")
def demo_pipeline():
    return load(device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def num_right(demo_pipeline):
    """Of five scenes that were never trained on, how many show each attribute as the prompt says.

    A third of the usual steps, or this would take minutes: ddim bears that best.
    """
    settings = {"num_inference_steps": 8, "sampler": "ddim"}
    checked = list(check(demo_pipeline, held_out_scenes(5), settings=settings))
    assert len({one.prompt for one in checked}) == 5
    return {name: sum(one.right[name] for one in checked) for name in ATTRIBUTES}


def test_the_demo_draws_the_background_it_is_told(num_right):
    assert num_right["background"] == 5


@pytest.mark.parametrize("attribute", ["colour", "shape", "motion"])
def test_the_demo_draws_the_colour_and_the_shape_and_moves_it_as_it_is_told(num_right, attribute):
    assert num_right[attribute] >= 4


def test_two_seeds_give_two_videos_and_one_seed_the_same_file_twice(demo_pipeline):
    first, again, other = (
        demo_pipeline.generate(PROMPT, seed=seed, num_inference_steps=2, num_frames=4, format="mp4")
        for seed in (7, 7, 8)
    )
    assert first.encode() == again.encode()
    assert not torch.equal(first.frames, other.frames)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
    checking.main()


def test_the_command_counts_what_is_right_and_shows_four_frames_of_each_video(
    tiny_checkpoint, tmp_path, monkeypatch, caplog
):
    sheet = tmp_path / "sheet.png"
    with caplog.at_level(logging.INFO, logger="t2v_core.demo.check"):
        run(monkeypatch, "--model", tiny_checkpoint, "--num-prompts", "4", "--sheet", sheet)
    assert [record.getMessage() for record in caplog.records][-1].startswith("4 prompts: background ")
    assert "seen as Seen(background=" in caplog.text  # random weights draw no such scene
    with av.open(str(sheet)) as container:
        (picture,) = container.decode(video=0)
    assert (picture.width, picture.height) == (3 * 4 * 64, 2 * 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-prompts", "0"], "--num-prompts 0: must be from 1 to 1000"),
        (["--sheet", "no/such/folder/sheet.png"], "create it first"),
    ],
)
def test_a_mistake_is_told_before_an_hour_of_work(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
