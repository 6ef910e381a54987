"""What a Denoiser and a Decoder on a GPU do before their first request, done on a CPU."""

from types import SimpleNamespace

import torch

from serve_app.decoder import Decoder
from serve_app.denoiser import Denoiser
from t2v_core.engine import Engine, FewFrames, RowBudgets
from t2v_core.schedule import Schedule
from t2v_core.shapes import VideoShape
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


def test_a_decoders_rehearsal_makes_a_video_of_the_models_own_size(tiny_pipeline, monkeypatch):
    autoencoder, sizes = tiny_pipeline.autoencoder, []
    encode, decode = autoencoder.encode, autoencoder.decode_frames
    monkeypatch.setattr(autoencoder, "encode", lambda frames: sizes.append(tuple(frames.shape)) or encode(frames))
    monkeypatch.setattr(autoencoder, "decode_frames", lambda z: sizes.append(tuple(z.shape)) or decode(z))
    Decoder._rehearse(SimpleNamespace(_network=autoencoder), VideoShape(num_frames=3, height=24, width=32))
    assert sizes == [(3, 4, 3, 4), (1, 3, 3, 24, 32)]
