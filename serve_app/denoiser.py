"""The denoiser as a deployment: the engine inside, one stream of events a request."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import torch

from serve_app.calls import (
    Checkpoint,
    DenoiseCall,
    Denoised,
    DenoiseEvent,
    DenoiserStatus,
    HandedBack,
    PreviewPicture,
    Progress,
)
from serve_app.config import DenoiserConfig
from serve_app.devices import place
from serve_app.draining import leaves_in_s
from serve_app.engine_metrics import EngineMetrics
from serve_app.errors import Superseded, Unavailable
from serve_app.health import Health, admit
from serve_app.job_logs import fields, log_through_serve, name_job
from serve_app.memory import free_bytes, gpu_memory, tell_memory
from serve_app.metrics import Metrics
from serve_app.owners import gone, this_replica
from serve_app.sizes import ROWS_A_VIDEO, SizeLimit, measured
from t2v_core import stages
from t2v_core.config import SamplerName
from t2v_core.denoising import Denoising
from t2v_core.engine import (
    ROWS,
    Admitted,
    Cancelled,
    Engine,
    EngineThread,
    Event,
    Failed,
    FewFrames,
    Finished,
    Preview,
    Profile,
    Request,
    RowBudgets,
    Stepped,
    free_memory_bytes,
    measure,
    warm_up,
)
from t2v_core.errors import UnreadableTrajectory
from t2v_core.graphs import replay_decoder, replayed_unet
from t2v_core.guidance import Conditioning
from t2v_core.params import resolve
from t2v_core.pictures import encode_spritesheet
from t2v_core.pipeline import check_precision
from t2v_core.schedule import Schedule
from t2v_core.shapes import VideoShape
from t2v_core.trajectory import Trajectory
from t2v_core.transfers import to_device
from t2v_core.unet3d import NoisePredictor
from t2v_core.weights import Checkpoint as Weights
from t2v_core.weights import load_autoencoder, load_unet

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_PROGRESS_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class _Leave:
    """Told to a call whose replica goes away."""


@dataclass(slots=True, eq=False)
class _Live:
    """A call that is being worked on."""

    call: DenoiseCall
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[tuple[float, Event | _Leave]] = field(default_factory=asyncio.Queue)
    why_stopped: str | None = None
    is_leaving: bool = False

    @property
    def engine_id(self) -> str:
        return f"{self.call.id}/{self.call.fence}"

    def superseded(self) -> Superseded:
        why = self.why_stopped or "the denoiser shuts down"
        return Superseded(f"{self.call.id}: attempt {self.call.fence} was stopped, since {why}")


class Denoiser:
    """Requests to latents. All that it holds of a request is in the engine, and goes where its caller goes."""

    def __init__(self, model: str, revision: str | None, config: DenoiserConfig) -> None:
        log_through_serve()
        self._config, self._metrics = config, Metrics()
        weights, self._device, self._dtype = place(model, revision, config, ["unet", "autoencoder"])
        check_precision(config.precision, self._dtype, self._device)
        fp8 = config.precision == "fp8"
        unet = replayed_unet(load_unet(weights, self._device, self._dtype, fp8=fp8))
        self._schedule = Schedule(weights.config.schedule)
        autoencoder = replay_decoder(load_autoencoder(weights, self._device, self._dtype))
        previewer = FewFrames(autoencoder, num_frames=1)  # all videos wait while it is decoded
        profile = self._profile(unet, weights)
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            self._rehearse(Engine(unet, RowBudgets(profile), previewer=previewer), weights)
        self._size_limit = self._measured_limit(unet, weights, profile)
        budgets = RowBudgets(
            profile,
            free_bytes=free_memory_bytes(self._device),
            unmeasured_rows=ROWS_A_VIDEO * config.max_ongoing,
        )
        self._engine = Engine(unet, budgets, previewer=previewer, cached_steps=config.cached_steps)
        self._engine_metrics = EngineMetrics(self._metrics, self._engine.counters)
        self._thread = EngineThread(self._engine, self._hand_over)
        self._health = Health("denoiser", config.stuck_after_s if on_gpu else None)  # a CPU may take that long
        self._live: dict[str, _Live] = {}  # by engine id
        self._watch: asyncio.Task[None] | None = None

    async def denoise(self, call: DenoiseCall, conditioning: Conditioning) -> AsyncIterator[DenoiseEvent]:
        """Progress, checkpoints and previews as they come, and the latents at the end. Closing it stops the work.

        Where the node goes away before that, the end is where the request stands: another replica goes on with it.
        Raises Superseded where a later attempt of the same request is here or comes, GenerationFailed,
        UnreadableTrajectory, and Unavailable where this replica cannot work.
        """
        began = time.monotonic()
        await admit("denoiser", lambda: self._health.is_broken or self._thread.failure is not None)
        self._supersede(call)
        live = _Live(call, asyncio.get_running_loop())
        self._live[live.engine_id] = live
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_surroundings())
        name_job(call.id, call.fence)  # not before: the watch is on behalf of all calls
        try:
            denoising = await asyncio.to_thread(self._health.watched, self._prepare, call, conditioning)
            if live.why_stopped is not None:  # meanwhile, when the engine did not know it yet
                raise live.superseded()
            trajectory = denoising.trajectory
            logger.info(
                "denoising: job=%s fence=%d step=%d num_steps=%d",
                call.id,
                call.fence,
                trajectory.step_index,
                trajectory.num_steps,
            )
            every = self._config.preview_every_steps if call.previews else 0
            self._thread.add(Request(live.engine_id, denoising, call.priority, None, call.waited_s, every))
            async for event in self._follow(live):
                if isinstance(event, Denoised):
                    seconds = time.monotonic() - began
                    self._metrics.stage("denoise", seconds)
                    logger.info("denoised: job=%s fence=%d denoise_s=%.3f", call.id, call.fence, seconds)
                yield event
        finally:
            self._thread.cancel(live.engine_id)
            del self._live[live.engine_id]

    async def status(self) -> DenoiserStatus:
        """What was done so far, and for whom."""
        counters = list(self._engine.counters.values())
        return DenoiserStatus(
            replica=this_replica(),
            steps=sum(c.steps for c in counters),
            rows=sum(c.rows for c in counters),
            live=tuple(live.call.id for live in self._live.values()),
        )

    async def size_limit(self) -> SizeLimit | None:
        """How large a video this replica can hold, as measured when it started."""
        return self._size_limit

    def check_health(self) -> None:
        """Serve replaces a replica whose GPU is lost, or hangs. It asks often enough for gauges, which Ray forgets."""
        tell_memory(self._metrics, gpu_memory(self._device))
        self._health.check(self._thread.busy_s)
        if self._thread.failure:
            raise Unavailable(f"the denoiser broke down ({self._thread.failure}): it is replaced")

    async def __del__(self) -> None:
        await asyncio.to_thread(self._thread.close)

    def _profile(self, unet: NoisePredictor, weights: Weights) -> Profile | None:
        """Measured step times, from the file or on the GPU now. Either way the network is warm afterwards.

        A file of another device, dtype or precision counts as none, and is written anew.
        """
        path = self._config.profile
        known = Profile.load(path) if path is not None and path.exists() else None
        if known is not None and not known.is_of(unet):
            logger.warning("profile %s: is of %s with %s, not of this denoiser", path, known.device, known.dtype)
            known = None
        if self._device.type == "cpu":
            return known
        sizes = [weights.config.defaults.shape, *(VideoShape(*size) for size in self._config.warm_up)]
        shapes = [size.latents() for size in dict.fromkeys(sizes)]
        began = time.monotonic()
        most_rows = ROWS_A_VIDEO * (self._config.max_ongoing + self._config.urgent_reserve)
        profile = known or measure(unet, shapes, rows=[number for number in ROWS if number <= most_rows])
        if known is None and path is not None:
            profile.save(path)
        rows = range(ROWS_A_VIDEO, most_rows + 1, ROWS_A_VIDEO)
        warm_up(unet, shapes, profile, rows=rows, caches_features=self._config.cached_steps > 0)
        logger.info("warm: warm_up_s=%.1f was_measured_before=%s", time.monotonic() - began, known is not None)
        return profile

    def _rehearse(self, engine: Engine, weights: Weights) -> None:
        """Two steps with noise and two without, and a preview: nor does any request wait for what these compile."""
        size = weights.config.text_encoder.context_length, weights.config.unet.cross_attention_dim
        text = torch.zeros(size, device=self._device, dtype=self._dtype)
        samplers: tuple[SamplerName, ...] = ("euler_a", "dpmpp_2m")
        for sampler in samplers:
            params = resolve("A panda.", {"sampler": sampler, "num_inference_steps": 2}, weights.config.defaults)
            plan = stages.plan(self._schedule, params)
            trajectory = stages.start(params, plan, self._device, self._dtype)
            denoising = Denoising(trajectory, plan, Conditioning(text, text, params.guidance_scale))
            engine.add(Request(sampler, denoising, preview_every=1))
        while len(engine):
            engine.step()
        torch.cuda.empty_cache()  # for the others on this GPU

    def _measured_limit(self, unet: NoisePredictor, weights: Weights, profile: Profile | None) -> SizeLimit | None:
        """By the profile or, where that tells nothing of memory, by one step of the model's own size."""
        if profile is None or profile.bytes_per_latent is None:
            profile = measure(unet, [weights.config.defaults.shape.latents()], rows=(ROWS_A_VIDEO,), repeats=0)
        limit = measured(profile, free_bytes(self._device))
        logger.info("size limit: %s", limit)
        return limit

    def _prepare(self, call: DenoiseCall, conditioning: Conditioning) -> Denoising:
        plan = stages.plan(self._schedule, call.params)
        if call.trajectory is None:
            video = None if call.video is None else call.video.to(self._device)
            trajectory = stages.start(call.params, plan, self._device, self._dtype, video)
        else:
            trajectory = Trajectory.from_bytes(call.trajectory, self._device)
            if (trajectory.shape, trajectory.num_steps) != (call.params.shape.latents(), plan.num_steps):
                raise UnreadableTrajectory(
                    f"trajectory of latents {tuple(trajectory.shape)} and {trajectory.num_steps} steps: "
                    "is not this request's; start it anew"
                )
        prompt, negative = (
            None if text is None else to_device(text, self._device, self._dtype)
            for text in (conditioning.prompt, conditioning.negative)
        )
        assert prompt is not None
        return Denoising(trajectory, plan, Conditioning(prompt, negative, conditioning.guidance_scale))

    def _supersede(self, call: DenoiseCall) -> None:
        for other in list(self._live.values()):
            if other.call.id == call.id:
                if other.call.fence >= call.fence:
                    raise Superseded(f"{call.id}: attempt {other.call.fence} is under way; leave it to that one")
                self._stop(other, f"attempt {call.fence} has taken it over")

    def _stop(self, live: _Live, why: str) -> None:
        live.why_stopped = why
        job_id, fence = live.call.id, live.call.fence
        logger.info("denoising stopped: job=%s fence=%d reason=%s", job_id, fence, why, extra=fields(job_id, fence))
        self._thread.cancel(live.engine_id)

    async def _watch_surroundings(self) -> None:
        """Whether those for whom the work is done are there, and this node stays. Ends when there is nothing to do."""
        while self._live:
            try:
                lost = await gone({owner for live in self._live.values() for owner in live.call.owners})
                left_s = await leaves_in_s()
            except Exception as error:  # while Ray's head is away nobody can be called dead
                logger.warning("owners and node cannot be looked at: %r", error)
                lost, left_s = set(), None
            for live in self._live.values():
                if lost.intersection(live.call.owners):
                    self._stop(live, "its owner is gone")
                elif left_s is not None and left_s < self._config.hand_back_s and not live.is_leaving:
                    live.is_leaving = True
                    live.events.put_nowait((time.monotonic(), _Leave()))
            await asyncio.sleep(_LOOK_EVERY_S)

    def _hand_over(self, event: Event) -> None:
        """In the engine's thread: to the call that the event is for, if that still listens."""
        self._engine_metrics.tell(event)
        live = self._live.get(event.id)
        if live is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody listens
                live.loop.call_soon_threadsafe(live.events.put_nowait, (time.monotonic(), event))

    async def _follow(self, live: _Live) -> AsyncIterator[DenoiseEvent]:
        began, first_step = time.monotonic(), None
        told = kept = began
        while True:
            now, event = await live.events.get()
            if isinstance(event, Stepped):
                left = event.num_steps - event.step_index
                first_step = event.step_index - 1 if first_step is None else first_step
                if left and now - told < _PROGRESS_EVERY_S:
                    continue
                told = now
                yield Progress(
                    event.step_index, event.num_steps, left * (now - began) / (event.step_index - first_step)
                )
                if live.call.keeps_checkpoints and left and now - kept > self._config.checkpoint_every_s:
                    kept = now
                    trajectory = await asyncio.wrap_future(self._thread.look(live.engine_id))
                    if trajectory is not None:
                        yield Checkpoint(trajectory.step_index, await self._saved(trajectory))
            elif isinstance(event, Preview):
                picture = await asyncio.to_thread(encode_spritesheet, event.frames, columns=len(event.frames))
                yield PreviewPicture(event.step_index, picture)
            elif isinstance(event, _Leave):
                trajectory = await asyncio.wrap_future(self._thread.take(live.engine_id))
                if trajectory is not None:  # else it has just ended, and the event of that is on its way
                    logger.info(
                        "handed back: job=%s fence=%d step=%d", live.call.id, live.call.fence, trajectory.step_index
                    )
                    yield HandedBack(trajectory.step_index, await self._saved(trajectory))
                    return
            elif isinstance(event, Finished):
                yield Denoised(await asyncio.to_thread(event.trajectory.latents.cpu))
                return
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Cancelled):
                raise live.superseded()
            elif isinstance(event, Admitted):  # told with the end of the first step, where none is launched ahead
                began += event.queue_s - live.call.waited_s

    async def _saved(self, trajectory: Trajectory) -> bytes:
        return await asyncio.to_thread(self._health.watched, trajectory.to_bytes)
