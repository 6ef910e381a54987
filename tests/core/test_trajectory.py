"""A request between two steps, as a file."""

import dataclasses

import pytest
import torch
from safetensors.torch import load, save

from t2v_core.errors import UnreadableTrajectory
from t2v_core.trajectory import NoiseSource, Trajectory


@pytest.fixture(params=[torch.float32, torch.float64])
def trajectory(request):
    source = NoiseSource(3)
    latents = torch.randn(4, 2, 3, 5, dtype=request.param)
    start = Trajectory.start(latents, source.state, 30)
    return dataclasses.replace(start, history=torch.randn(2, 4, 2, 3, 5, dtype=request.param), step_index=12)


def test_it_comes_back_exact_to_the_bit_and_draws_the_same_noise(trajectory):
    read = Trajectory.from_bytes(trajectory.to_bytes())
    assert torch.equal(read.latents, trajectory.latents)
    assert torch.equal(read.history, trajectory.history)
    assert read.latents.dtype == trajectory.latents.dtype
    assert (read.step_index, read.num_steps) == (12, 30)
    shape = trajectory.shape
    noise = NoiseSource(state=read.noise_state).frames(shape)
    assert torch.equal(noise, NoiseSource(state=trajectory.noise_state).frames(shape))


def test_a_row_of_a_batch_is_saved_without_its_neighbours(trajectory):
    batch = torch.stack([trajectory.latents] * 50)
    row = dataclasses.replace(trajectory, latents=batch[7])
    assert len(row.to_bytes()) == len(trajectory.to_bytes())


def changed(file, **tensors):
    return save(load(file) | tensors)


def without(file, name):
    tensors = load(file)
    del tensors[name]
    return save(tensors)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: b"",
        lambda file: file[:100],
        lambda file: file[:-1],
        lambda file: without(file, "history"),
        lambda file: changed(file, history=torch.zeros(2, 4, 2, 3, 4)),
        lambda file: changed(file, latents=torch.zeros(4, 2, 3)),
        lambda file: changed(file, steps=torch.tensor([30, 31])),
        lambda file: changed(file, steps=torch.tensor([30])),
        lambda file: changed(file, steps=torch.tensor([30.0, 12.0])),
        lambda file: changed(file, latents=torch.zeros(4, 0, 3, 5), history=torch.zeros(2, 4, 0, 3, 5)),
        lambda file: changed(file, noise_state=torch.zeros(10, dtype=torch.uint8)),
        lambda file: changed(file, latents=torch.zeros(4, 2, 3, 5, dtype=torch.int64)),
    ],
)
def test_a_damaged_file_is_refused(trajectory, damage):
    with pytest.raises(UnreadableTrajectory, match="start the request anew"):
        Trajectory.from_bytes(damage(trajectory.to_bytes()))
