"""What a Denoiser on a GPU does before its first request, done on a CPU."""

from types import SimpleNamespace

import torch

from serve_app.denoiser import Denoiser
from t2v_core.engine import Engine, FewFrames, RowBudgets
from t2v_core.schedule import Schedule
from t2v_core.weights import open_checkpoint


def test_a_rehearsal_goes_through_all_that_steps_do(tiny_checkpoint, tiny_pipeline):
    previews = []

    class Previewer(FewFrames):
        def __call__(self, x0):
            previews.append(tuple(x0.shape))
            return super().__call__(x0)

    weights = open_checkpoint(str(tiny_checkpoint))
    previewer = Previewer(tiny_pipeline.autoencoder, num_frames=1)
    engine = Engine(tiny_pipeline.unet, RowBudgets(unmeasured_rows=4), previewer=previewer)
    schedule = Schedule(weights.config.schedule)
    # What of it is used; the rest needs Ray.
    denoiser = SimpleNamespace(_device=torch.device("cpu"), _dtype=torch.float32, _schedule=schedule)
    Denoiser._rehearse(denoiser, engine, weights)
    assert len(engine) == 0
    assert len(previews) == 2  # of each request, after the first of its two steps
