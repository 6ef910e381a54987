"""Requests of the small model of random weights, and what each of them becomes alone."""

import pytest

from t2v_core.engine import Engine, RowBudgets

SMALL = {"num_frames": 2, "width": 16, "height": 16}


@pytest.fixture(scope="session")
def prepared(tiny_pipeline_float64):
    """Makes a request's start; the same settings give the same."""
    known = {}

    def prepare(**settings):
        settings = {"prompt": "a panda", "seed": 1, "num_inference_steps": 5} | SMALL | settings
        key = tuple(sorted(settings.items()))
        if key not in known:
            known[key] = tiny_pipeline_float64.prepare(tiny_pipeline_float64.params(**settings))
        return known[key]

    return prepare


@pytest.fixture(scope="session")
def alone(tiny_pipeline_float64, prepared):
    """What a request becomes by itself: the pipeline's own result."""
    known = {}

    def latents(**settings):
        settings = {"prompt": "a panda", "seed": 1, "num_inference_steps": 5} | SMALL | settings
        key = tuple(sorted(settings.items()))
        if key not in known:
            *_, last = tiny_pipeline_float64.denoise(tiny_pipeline_float64.params(**settings))
            known[key] = last.latents
        return known[key]

    return latents


@pytest.fixture(params=[False, True], ids=["step by step", "running ahead"])
def engine(tiny_pipeline_float64, request):
    return Engine(tiny_pipeline_float64.unet, RowBudgets(unmeasured_rows=8), runs_ahead=request.param)


@pytest.fixture
def rows_of_each_call(tiny_pipeline_float64):
    rows = []
    handle = tiny_pipeline_float64.unet.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[3])))
    yield rows
    handle.remove()
