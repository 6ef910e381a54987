"""On a GPU, the networks' fast paths give what the plain ones give, eagerly and from graphs."""

import copy

import pytest
import torch
from references import relative_error

from t2v_core.autoencoder import Autoencoder
from t2v_core.graphs import GraphedUNet, replay_decoder
from t2v_core.unet3d import UNet3D
from t2v_core.weights.networks import prepare
from t2v_core.weights.random_init import TINY, randomise

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def unets():
    """The one in fp16 that is fast, and the same weights in float64 on the CPU."""
    unet = randomise(UNet3D(TINY.unet), torch.Generator().manual_seed(0)).half()
    return prepare(copy.deepcopy(unet).cuda()), unet.double().eval().requires_grad_(False)


def inputs(num_videos: int, num_rows: int, side: int = 8):
    latents = torch.randn(num_videos, 4, 5, side, side + 1).half()
    timesteps = torch.linspace(900.0, 3.0, num_videos)
    rows = torch.tensor([*range(num_videos), *range(num_rows - num_videos)])
    return latents, timesteps, torch.randn(num_rows, 77, TINY.unet.cross_attention_dim).half(), rows


@pytest.mark.parametrize(("num_videos", "num_rows"), [(1, 1), (1, 2), (3, 5)])
def test_the_unet(unets, num_videos, num_rows):
    fast, exact = unets
    latents, timesteps, text_embeds, rows = inputs(num_videos, num_rows)
    expected = exact(latents.double(), timesteps, text_embeds.double(), rows)
    text = fast.read_text(text_embeds.cuda())
    actual = fast(latents.cuda(), timesteps.cuda(), text, rows.cuda())
    assert relative_error(actual.cpu().double(), expected) <= 5e-3
    assert torch.equal(GraphedUNet(fast)(latents.cuda(), timesteps.cuda(), text, rows.cuda()), actual)


def test_the_unet_in_fp8(unets):
    """As far from the exact result as where the same is rounded, and products add up in float64.

    Not as near to that: what is rounded one way there goes the other way here for a difference in the last digit, and
    of random weights the whole result follows.
    """
    _, exact = unets
    unet = randomise(UNet3D(TINY.unet), torch.Generator().manual_seed(0)).half()
    fast, rounded = prepare(copy.deepcopy(unet).cuda(), fp8=True), prepare(unet.double(), fp8=True)
    latents, timesteps, text_embeds, rows = inputs(2, 3)
    doubles = latents.double(), timesteps, text_embeds.double(), rows
    expected = exact(*doubles)
    text = fast.read_text(text_embeds.cuda())
    actual = fast(latents.cuda(), timesteps.cuda(), text, rows.cuda())
    assert relative_error(actual.cpu().double(), expected) <= 1.2 * relative_error(rounded(*doubles), expected)
    assert torch.equal(GraphedUNet(fast)(latents.cuda(), timesteps.cuda(), text, rows.cuda()), actual)


def test_graphs_keep_and_reuse_features(unets):
    fast, _ = unets
    graphed = GraphedUNet(fast)
    latents, timesteps, text_embeds, rows = (tensor.cuda() for tensor in inputs(2, 3))
    text = fast.read_text(text_embeds)
    for step in range(2):
        now = latents + step, timesteps - step, text, rows
        (eps, features), (eager_eps, eager_features) = graphed.predict(*now), fast.predict(*now)
        assert torch.equal(eps, eager_eps)
        assert torch.equal(features, eager_features)
        later = latents - step, timesteps - step - 1, text, rows, features
        assert torch.equal(graphed.predict(*later)[0], fast.predict(*later)[0])


def test_a_graph_reads_every_input_anew(unets):
    fast, _ = unets
    graphed = GraphedUNet(fast)
    for _ in range(3):
        latents, timesteps, text_embeds, rows = (tensor.cuda() for tensor in inputs(2, 3))
        text = fast.read_text(text_embeds)
        for step in range(2):
            now = timesteps - step
            assert torch.equal(graphed(latents + step, now, text, rows), fast(latents + step, now, text, rows))
        other_rows = torch.tensor([0, 1, 1], device="cuda")
        assert torch.equal(graphed(latents, timesteps, text, other_rows), fast(latents, timesteps, text, other_rows))


def test_the_result_of_a_graph_is_the_callers_to_keep(unets):
    fast, _ = unets
    graphed = GraphedUNet(fast)
    latents, timesteps, text_embeds, rows = (tensor.cuda() for tensor in inputs(1, 2))
    text = fast.read_text(text_embeds)
    first = graphed(latents, timesteps, text, rows)
    kept = first.clone()
    graphed(latents + 1, timesteps, text, rows)
    assert torch.equal(first, kept)


def test_the_decoder():
    autoencoder = randomise(Autoencoder(TINY.autoencoder), torch.Generator().manual_seed(0)).half()
    fast = prepare(copy.deepcopy(autoencoder).cuda())
    latents = torch.randn(4, 5, 6, 7).half()
    eager = torch.cat(list(fast.decode_chunks(latents.cuda())))
    expected = torch.cat(list(autoencoder.double().requires_grad_(False).decode_chunks(latents.double())))
    assert relative_error(eager.cpu().double(), expected) <= 5e-3
    replayed = replay_decoder(fast)
    for _ in range(2):
        assert torch.equal(torch.cat(list(replayed.decode_chunks(latents.cuda()))), eager)
