"""Fixtures that every kind of test uses."""

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from t2v_core.pipeline import Pipeline, load
from t2v_core.weights.random_init import TINY, write_random_checkpoint

# Small networks are slower on several threads, and far slower on several busy ones.
torch.set_num_threads(1)

# What `nohup` and a shell's background leave ignored, programs that tests start and stop would ignore as well. What a
# handler ignores, they do not.
for stop in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(stop) is signal.SIG_IGN:
        signal.signal(stop, lambda *_: None)

# A busy machine is no failure: nothing here is timed.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights in the diffusers layout: the real networks, small."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(folder, TINY)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_checkpoint: Path) -> Pipeline:
    return load(tiny_checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_pipeline_float64(tiny_checkpoint: Path) -> Pipeline:
    return load(tiny_checkpoint, device="cpu", dtype=torch.float64)
