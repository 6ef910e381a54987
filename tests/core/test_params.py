"""A request is checked once, and a wrong one is told the value, the rule and the remedy."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2v_core.config import SAMPLER_NAMES, GenerationDefaults
from t2v_core.errors import InvalidRequest
from t2v_core.params import GenerationParams, resolve

DEFAULTS = GenerationDefaults()


@pytest.mark.parametrize(
    ("settings", "param", "message"),
    [
        ({"width": 100}, "width", r"width 100: must be a multiple of 8; try 96 or 104"),
        ({"height": 12}, "height", r"height 12: must be a multiple of 8; try 8 or 16"),
        ({"width": 0}, "width", r"width 0: must be from 8 to 4096"),
        ({"width": 8192}, "width", r"must be from 8 to 4096"),
        ({"height": 64.0}, "height", r"must be a whole number"),
        ({"num_frames": 0}, "num_frames", r"num_frames 0: must be from 1 to 1024"),
        ({"num_frames": True}, "num_frames", r"num_frames True: must be a whole number"),
        ({"fps": 0}, "fps", r"fps 0: must be from 1 to 120"),
        ({"num_inference_steps": 0}, "num_inference_steps", r"must be from 1 to 999"),
        ({"num_inference_steps": 1000}, "num_inference_steps", r"num_inference_steps 1000: must be from 1 to 999"),
        ({"guidance_scale": math.nan}, "guidance_scale", r"guidance_scale nan: must be a number from 0 to 100"),
        ({"guidance_scale": math.inf}, "guidance_scale", r"guidance_scale inf"),
        ({"guidance_scale": 10**400}, "guidance_scale", r"guidance_scale 10+: must be a number from 0 to 100"),
        ({"guidance_scale": -1.0}, "guidance_scale", r"guidance_scale -1.0"),
        ({"guidance_scale": "9"}, "guidance_scale", r"guidance_scale '9'"),
        ({"sampler": "plms"}, "sampler", r"sampler 'plms': must be one of ddim, euler"),
        ({"seed": -1}, "seed", r"seed -1: must be from 0"),
        ({"seed": 2**32}, "seed", r"must be from 0 to 4294967295"),
        ({"format": "gif", "fps": 60}, "fps", r"fps 60: a gif plays at most 50"),
        ({"eta": 0.5}, "eta", r"eta 0.5 with sampler dpmpp_2m: only ddim has an eta"),
        ({"eta": 2.0, "sampler": "ddim"}, "eta", r"eta 2.0"),
        ({"strength": 0.5}, "strength", r"strength 0.5 without an input video"),
        ({"format": "avi"}, "format", r"format 'avi': must be one of mp4, webm, gif"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt", r"negative_prompt has 4001 characters: at most 4000"),
        ({"negative_prompt": 7}, "negative_prompt", r"negative_prompt 7: must be text"),
        ({"num_step": 7}, "num_step", r"num_step: no such setting; there are negative_prompt, width"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(settings, param, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        resolve("A panda", settings, DEFAULTS)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", ["", "  \n ", "x" * 4001, None, 7])
def test_a_prompt_must_say_something_and_not_too_much(prompt):
    with pytest.raises(InvalidRequest, match="prompt") as caught:
        resolve(prompt, {}, DEFAULTS)
    assert caught.value.param == "prompt"


def test_what_is_not_said_comes_from_the_checkpoint():
    params = resolve("A panda", {"width": None, "seed": 0}, DEFAULTS)
    assert (params.width, params.num_frames, params.sampler) == (256, 16, "dpmpp_2m")
    assert params.seed == 0


def test_without_a_seed_one_is_drawn():
    assert len({resolve("A panda", {}, DEFAULTS).seed for _ in range(4)}) == 4


def with_video(strength, steps, video_shape=(4, 16, 8, 3), dtype=torch.uint8):
    params = resolve("A panda", {"num_inference_steps": steps, "width": 8, "height": 16, "num_frames": 4}, DEFAULTS)
    return dataclasses.replace(params, strength=strength, video=torch.zeros(video_shape, dtype=dtype))


@pytest.mark.parametrize(
    ("strength", "steps", "first_step"), [(0.6, 50, 20), (1.0, 25, 0), (0.65, 10, 4), (0.02, 50, 49)]
)
def test_strength_is_the_share_of_the_steps_that_are_run(strength, steps, first_step):
    params = with_video(strength, steps)
    assert (params.first_step, params.num_steps) == (first_step, steps - first_step)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, math.nan, 0.019, None])
def test_a_strength_that_runs_no_step_is_refused(strength):
    with pytest.raises(InvalidRequest, match="strength"):
        with_video(strength, 50)


@pytest.mark.parametrize("shape", [(3, 16, 8, 3), (4, 8, 16, 3), (4, 16, 8, 4), (4, 3, 16, 8)])
def test_an_input_video_must_have_the_requests_shape(shape):
    with pytest.raises(InvalidRequest, match=r"must be torch.uint8 \(4, 16, 8, 3\)"):
        with_video(0.5, 50, shape)


def test_an_input_video_must_be_bytes():
    with pytest.raises(InvalidRequest, match="float32"):
        with_video(0.5, 50, dtype=torch.float32)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(
                st.none(),
                st.integers(),
                st.floats(),
                st.text(max_size=5),
                st.booleans(),
                st.sampled_from(SAMPLER_NAMES),
            )
            for name in (
                "width",
                "height",
                "num_frames",
                "fps",
                "num_inference_steps",
                "guidance_scale",
                "sampler",
                "seed",
                "eta",
                "strength",
            )
        },
    )
)
def test_any_settings_are_a_valid_request_or_a_clear_error(settings):
    try:
        params = resolve("A panda", settings, DEFAULTS)
    except InvalidRequest as refused:
        error = refused
    else:
        assert isinstance(params, GenerationParams)
        assert params.shape.latents().height * 8 == params.height
        return
    assert error.param in settings
    assert str(error).startswith(error.param)
