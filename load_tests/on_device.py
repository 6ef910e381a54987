"""The systems under test on a real UNet: its random weights, its requests, its steps, and the engine itself."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from arrivals import ROWS_A_VIDEO, Job
from results import Overhead
from systems import Worked

from t2v_core.config import SamplerName, ScheduleConfig, UNetConfig
from t2v_core.denoising import Denoising, denoise_step
from t2v_core.engine import Engine, Failed, Finished, Profile, Request, RowBudgets, Stepped
from t2v_core.engine.profile import Measurement
from t2v_core.graphs import replayed_unet
from t2v_core.guidance import BatchConditioning, Conditioning, condition
from t2v_core.samplers import coefficients
from t2v_core.schedule import Schedule
from t2v_core.shapes import LatentShape
from t2v_core.trajectory import NoiseSource, Trajectory
from t2v_core.unet3d import UNet3D
from t2v_core.weights.networks import prepare
from t2v_core.weights.random_init import randomise

NUM_TOKENS = 77
_WARM_UP_STEPS, _SERIES = 3, 3


class Model:
    """A UNet of random weights, and requests with random latents and texts for it."""

    def __init__(self, config: UNetConfig, device: torch.device, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            unet = UNet3D(config)
        randomise(unet.to_empty(device=device), torch.Generator(device).manual_seed(0))
        self.unet = replayed_unet(prepare(unet.to(dtype)))
        self.device, self.dtype = device, dtype
        self._schedule = Schedule(ScheduleConfig())
        self._generator = torch.Generator(device).manual_seed(0)

    def denoising(self, shape: LatentShape, num_steps: int, sampler: SamplerName = "dpmpp_2m") -> Denoising:
        """A request before its first step, with guidance."""
        latents = self._draw(*shape, dtype=torch.float32)
        trajectory = Trajectory.start(latents, NoiseSource(seed=0).state, num_steps)
        prompt, negative = self._draw(2, NUM_TOKENS, self.unet.config.cross_attention_dim, dtype=self.dtype)
        return Denoising(
            trajectory, coefficients(sampler, self._schedule, num_steps), Conditioning(prompt, negative, 9.0)
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _draw(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, generator=self._generator, device=self.device, dtype=dtype)


class UNetSteps:
    """Denoising steps by the code that the engine uses as well."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._denoisings: dict[str, Denoising] = {}
        self._batch: list[str] = []
        self._conditioning: BatchConditioning | None = None

    def __call__(self, jobs: Sequence[Job]) -> list[Job]:
        for job in jobs:
            if job.id not in self._denoisings:
                self._denoisings[job.id] = self._model.denoising(*job.kind)
        ids = [job.id for job in jobs]
        batch = [self._denoisings[job_id] for job_id in ids]
        if ids != self._batch or self._conditioning is None:
            self._batch = ids
            self._conditioning = condition(self._model.unet, [request.conditioning for request in batch])
        stepped = denoise_step(self._model.unet, batch, self._conditioning)
        self._denoisings.update(zip(ids, stepped, strict=True))
        done = [job for job, request in zip(jobs, stepped, strict=True) if request.trajectory.is_finished]
        if done:  # before that, launching may run ahead of the device
            self._model.synchronize()
        for job in done:
            del self._denoisings[job.id]
        return done


class EngineItself:
    """The engine as a system under test."""

    def __init__(self, engine: Engine, model: Model) -> None:
        self._engine, self._model = engine, model
        self._jobs: dict[str, Job] = {}

    def add(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._engine.add(Request(job.id, self._model.denoising(*job.kind), job.priority))

    def ready_s(self) -> float:
        return 0.0 if len(self._engine) else math.inf

    def work(self) -> Worked:
        pause_s = self._engine.pause_s()
        if pause_s > 0:  # as in EngineThread: who comes until then may be in the next step
            time.sleep(pause_s)
            return Worked([], [])
        events = self._engine.advance()
        for event in events:
            if isinstance(event, Failed):
                raise event.error  # then the figures would be of fewer requests
        stepped = [self._jobs[event.id] for event in events if isinstance(event, Stepped)]
        return Worked(stepped, [self._jobs.pop(event.id) for event in events if isinstance(event, Finished)])


@torch.inference_mode()
def overhead(model: Model, shape: LatentShape, sampler: SamplerName, num_videos: int, repeats: int) -> Overhead:
    """The engine's steps beside as many bare calls of the UNet, one after the other: these, those, and these again."""
    rows = num_videos * ROWS_A_VIDEO
    room = Profile(device="", dtype="", measurements=(Measurement(shape=shape, rows=rows, step_s=1.0, memory_bytes=0),))
    engine = Engine(model.unet, RowBudgets(room))
    num_steps = _WARM_UP_STEPS + _SERIES * (repeats + 1)
    requests = [model.denoising(shape, num_steps, sampler) for _ in range(num_videos)]
    for number, request in enumerate(requests):
        engine.add(Request(str(number), request))
    conditioning = condition(model.unet, [request.conditioning for request in requests])
    latents = torch.stack([request.trajectory.latents for request in requests]).to(model.dtype)
    timesteps = torch.full((num_videos,), 500.0, device=model.device)

    def bare() -> None:
        model.unet(latents, timesteps, conditioning.text, conditioning.rows)

    def steps() -> None:
        time.sleep(engine.pause_s())
        engine.advance()

    def seconds(call: Callable[[], object]) -> float:
        model.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        model.synchronize()
        return (time.perf_counter() - started) / repeats

    for _ in range(_WARM_UP_STEPS):
        bare()
        engine.step()
    before, ours, after = [], [], []
    for _ in range(_SERIES):
        before.append(seconds(bare))
        engine.step()  # the first is not launched ahead, and all that was launched ends in this series
        ours.append(seconds(steps))
        after.append(seconds(bare))
    first, step, second = (statistics.median(series) for series in (before, ours, after))
    bare_s = statistics.median(before + after)
    return Overhead(
        sampler=sampler, num_videos=num_videos, engine_s=step, unet_s=bare_s, noise=abs(first - second) / bare_s
    )
