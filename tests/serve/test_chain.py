"""A request on its way through the stages: what each is sent, and what is told when one is lost."""

import concurrent.futures
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentResponseGenerator

from serve_app.bounds import Callers
from serve_app.calls import DenoiseCall, Denoised, HandedBack
from serve_app.chain import Chain
from serve_app.errors import Unavailable
from serve_app.ingress import Ingress
from t2v_core.config import GenerationDefaults
from t2v_core.params import resolve

pytestmark = pytest.mark.anyio
LOST = [DeploymentUnavailableError(DeploymentID(name="Denoiser")), ActorDiedError()]


def lost(error: Exception) -> Any:
    """A handle whose call never begins, for Serve's own response says so."""
    assigned: concurrent.futures.Future[Any] = concurrent.futures.Future()
    assigned.set_exception(error)
    response = DeploymentResponseGenerator(assigned, SimpleNamespace(), _is_router_running_in_separate_loop=True)  # type: ignore[arg-type]
    method = SimpleNamespace(remote=lambda *_: response)
    return SimpleNamespace(denoise=method, encode=method, generate_stream=method, options=lambda **_: lost(error))


class Stages:
    """The three stages' handles, which keep what they are sent."""

    def __init__(self, *events: Any) -> None:
        self.sent: dict[str, list[tuple[Any, ...]]] = {}
        self._events = iter(events)

    def chain(self) -> Chain:
        encoder = SimpleNamespace(encode=self._method("text", lambda: "conditioning"))
        denoiser = SimpleNamespace(denoise=self._method("denoise", self._stream))
        decoder = SimpleNamespace(
            encode=self._method("encode", self._answer("latents of the input")),
            decode=self._method("decode", self._answer("files")),
        )
        return Chain(encoder, denoiser, decoder)  # type: ignore[arg-type]

    def _method(self, name: str, answer: Any) -> Any:
        def remote(*arguments: Any) -> Any:
            self.sent.setdefault(name, []).append(arguments)
            return answer()

        return SimpleNamespace(remote=remote)

    def _answer(self, value: str) -> Any:
        async def answer() -> str:
            return value

        return answer

    def _stream(self) -> Any:
        async def events() -> Any:
            yield next(self._events)

        stream = events()
        return type("Stream", (), {"__aiter__": lambda _: stream, "cancel": lambda _: None})()


async def test_only_the_stage_that_reads_an_input_video_is_sent_its_frames() -> None:
    frames = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    settings: Any = {"width": 64, "height": 64, "strength": 0.5, "num_inference_steps": 10}
    params = resolve("a", settings, GenerationDefaults(), frames)
    stages = Stages(HandedBack(3, b"trajectory"), Denoised(torch.zeros(1)))
    call = DenoiseCall(id="a", fence=1, owners=(), params=params)
    assert [event async for event in stages.chain().run(call)][-1] == "files"  # type: ignore[comparison-overlap]
    assert stages.sent.pop("encode") == [(params.video,)]
    first, second = (arguments[0] for arguments in stages.sent["denoise"])
    assert (first.video, first.trajectory) == ("latents of the input", None)
    assert (second.video, second.trajectory) == (None, b"trajectory")
    told = [first.params, second.params, stages.sent["text"][0][0], stages.sent["decode"][0][1]]
    assert [(p.video, p.strength, p.first_step, p.prompt) for p in told] == [(None, 0.5, 5, "a")] * 4
    assert params.video is not None


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
async def test_a_stage_that_is_not_there_is_unavailable(error: Exception) -> None:
    call = DenoiseCall(id="a", fence=1, owners=(), params=resolve("a", {}, GenerationDefaults()))
    chain = Chain(lost(error), lost(error), lost(error))
    with pytest.raises(Unavailable, match="the denoiser was lost"):
        [event async for event in chain.run(call)]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
async def test_a_generator_that_is_not_there_is_unavailable(error: Exception) -> None:
    async def resolved(*_: Any) -> None:
        pass

    ingress: Any = SimpleNamespace(
        _parts=SimpleNamespace(callers=Callers(None, None)),
        _resolved=resolved,
        _generator=lost(error),
        _owned=lambda _: (),
    )
    with pytest.raises(Unavailable, match="the generator was lost"):
        [event async for event in Ingress.generate_stream(ingress, "a")]
