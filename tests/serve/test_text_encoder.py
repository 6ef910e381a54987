"""The text encoder's replica, without Serve around it."""

import asyncio

import pytest
import torch
from replica_context import become_replica

from serve_app.config import TextEncoderConfig
from serve_app.text_encoder import TextEncoder


@pytest.fixture
def encoder(tiny_checkpoint, monkeypatch):
    become_replica("TextEncoder", monkeypatch)  # serve.batch asks whose batches it counts
    return TextEncoder(str(tiny_checkpoint), None, TextEncoderConfig(dtype="fp32", cache_entries=4))


@pytest.fixture
def embedded(encoder):
    """How many texts went through the network, call by call."""
    numbers = []
    handle = encoder._network.register_forward_pre_hook(lambda _, arguments: numbers.append(len(arguments[0])))
    yield numbers
    handle.remove()


async def encode(encoder, *params):
    calls = [encoder.encode(one, f"job {number}", 1) for number, one in enumerate(params)]
    return await asyncio.gather(*calls, return_exceptions=True)


def test_requests_that_come_together_share_what_they_have_in_common(encoder, embedded, tiny_pipeline):
    params = [tiny_pipeline.params(prompt) for prompt in ("a panda", "a panda", "a fox", "a panda")]
    conditionings = asyncio.run(encode(encoder, *params))
    assert sum(embedded) == 3  # a panda, a fox, and the negative prompt of all
    for one, conditioning in zip(params, conditionings, strict=True):
        expected = tiny_pipeline.prepare(one).conditioning
        torch.testing.assert_close(conditioning.prompt, expected.prompt, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(conditioning.negative, expected.negative, rtol=1e-4, atol=1e-5)


def test_a_request_that_is_cancelled_leaves_the_others_what_it_began(encoder, embedded, tiny_pipeline):
    params = tiny_pipeline.params("a panda")

    async def first_gives_up():
        first = asyncio.create_task(encoder.encode(params, "job 1", 1))
        await asyncio.sleep(0)
        second = asyncio.create_task(encoder.encode(params, "job 2", 1))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(first_gives_up()).prompt.shape == (77, tiny_pipeline.unet.config.cross_attention_dim)
    assert sum(embedded) == 2


def test_what_failed_is_tried_again(encoder, tiny_pipeline, monkeypatch):
    params = tiny_pipeline.params("a panda")
    network = encoder._network

    def run_out(_):
        raise RuntimeError("no memory")

    async def twice():
        with monkeypatch.context() as broken:
            broken.setattr(network, "encode", run_out)
            failures = await encode(encoder, params, params)
        return failures, await encode(encoder, params)

    failures, (conditioning,) = asyncio.run(twice())
    assert [str(error) for error in failures] == ["no memory"] * 2
    assert conditioning.negative is not None


def test_the_cache_is_bounded(encoder, embedded, tiny_pipeline):
    async def one_by_one():
        for number in range(6):
            await encoder.encode(tiny_pipeline.params(f"panda {number}"), "job", 1)
        before = sum(embedded)
        await encoder.encode(tiny_pipeline.params("panda 5"), "job", 1)
        assert sum(embedded) == before
        await encoder.encode(tiny_pipeline.params("panda 0"), "job", 1)
        assert sum(embedded) == before + 1

    asyncio.run(one_by_one())
