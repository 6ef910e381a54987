"""One request through the three stages."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app.calls import (
    Checkpoint,
    DenoiseCall,
    Denoised,
    DenoiseEvent,
    HandedBack,
    PreviewPicture,
    Progress,
    Rendered,
)
from serve_app.remote import plain_errors, result_of, stop


@dataclass(frozen=True, slots=True)
class Chain:
    """Handles to the stages. `denoiser` streams."""

    text_encoder: "DeploymentHandle[Any]"
    denoiser: "DeploymentHandle[Any]"
    decoder: "DeploymentHandle[Any]"

    async def run(self, call: DenoiseCall) -> AsyncGenerator[Progress | Checkpoint | PreviewPicture | Rendered, None]:
        """What happens on the way, and the files at the end. Closing it stops what runs.

        Raises what the stages raise, and Unavailable where a replica died or cannot be reached.
        """
        if call.params.video is not None and call.trajectory is None:
            with plain_errors("decoder"):
                call = replace(call, video=await result_of(self.decoder.encode.remote(call.params.video)))
        call = replace(call, params=call.params.without_frames())  # which may be hundreds of megabytes
        latents, is_handed_back = None, True
        while is_handed_back:
            is_handed_back = False
            async with aclosing(self._denoise(call)) as events:
                async for event in events:
                    if isinstance(event, Denoised):
                        latents = event.latents
                    elif isinstance(event, HandedBack):
                        call, is_handed_back = replace(call, trajectory=event.trajectory, video=None), True
                        yield Checkpoint(event.step, event.trajectory)
                    else:
                        yield event
        assert latents is not None
        with plain_errors("decoder"):
            rendered: Rendered = await result_of(self.decoder.decode.remote(latents, call.params, call.id, call.fence))
        yield rendered

    async def _denoise(self, call: DenoiseCall) -> AsyncGenerator[DenoiseEvent, None]:
        """On one replica, to the latents or as far as that comes."""
        # The conditioning goes from stage to stage, and not through here.
        conditioning = self.text_encoder.encode.remote(call.params, call.id, call.fence)
        stream = cast("DeploymentResponseGenerator[DenoiseEvent]", self.denoiser.denoise.remote(call, conditioning))
        try:
            with plain_errors("denoiser"):
                async for event in stream:
                    yield event
        finally:
            stop(stream)
