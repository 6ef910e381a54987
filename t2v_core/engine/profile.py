"""How long a step takes, and how much memory, by shape and number of rows: measured, saved, read again."""

import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from t2v_core.engine.memory import peak_bytes
from t2v_core.errors import InvalidProfile, OutOfMemory
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.shapes import LatentShape
from t2v_core.unet3d import NoisePredictor, TextKeysValues

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
_REPEATS = 3


class Measurement(BaseModel):
    """One call of the UNet: median seconds, and the bytes it takes beside the weights (0: not known)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: LatentShape
    rows: int = Field(ge=1)
    step_s: float = Field(gt=0)
    memory_bytes: int = Field(ge=0)

    @property
    def volume(self) -> int:
        """Latents in all rows: what work and memory grow with."""
        return self.rows * volume(self.shape)


class Profile(BaseModel):
    """What was measured on one kind of device, of a UNet with weights of these types."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    dtype: str
    measurements: tuple[Measurement, ...] = Field(min_length=1)

    def is_of(self, unet: NoisePredictor) -> bool:
        """Whether it was measured with such weights on such a device: another's step times say nothing here."""
        return (self.device, self.dtype) == (_device_name(unet), _dtype_names(unet))

    def rows_for(self, shape: LatentShape, share: float = 1.0) -> int:
        """The fewest rows that give this share of the best throughput.

        A shape that was not measured goes by its volume.
        """
        nearest = self._of_nearest(shape)
        best = max(m.rows / m.step_s for m in nearest)
        rows = next(m.rows for m in nearest if m.rows / m.step_s >= share * best)
        return max(1, round(rows * volume(nearest[0].shape) / volume(shape)))

    def step_s(self, shape: LatentShape, rows: int) -> float:
        """Seconds of a step of so many rows: on the line between two measurements, or in proportion to the last."""
        nearest = self._of_nearest(shape)
        wanted = rows * volume(shape)
        below = next((m for m in reversed(nearest) if m.volume <= wanted), None)
        above = next((m for m in nearest if m.volume >= wanted), None)
        if below is None:
            return nearest[0].step_s
        if above is None:
            return below.step_s * wanted / below.volume
        if above.volume == below.volume:
            return below.step_s
        share = (wanted - below.volume) / (above.volume - below.volume)
        return below.step_s + share * (above.step_s - below.step_s)

    def rows_that_fit(self, shape: LatentShape, free_bytes: int) -> int | None:
        """How many rows this much memory holds; None where memory was not measured."""
        most = max(m.memory_bytes / m.volume for m in self.measurements)
        return int(free_bytes / (most * volume(shape))) if most else None

    @property
    def bytes_per_latent(self) -> float | None:
        """Memory of a row for each of its latents, by the largest call that was measured; None if none was."""
        largest = max(self.measurements, key=lambda m: m.volume)
        return largest.memory_bytes / largest.volume or None

    def save(self, path: Path) -> None:
        """Whole or not at all: several replicas may write it, and others read it meanwhile."""
        partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        partial.write_text(self.model_dump_json(indent=1))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Raises InvalidProfile."""
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
            raise InvalidProfile(f"{path}: is no profile ({reason}); measure it again") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidProfile(f"{path}: cannot be read ({error}); measure it again") from error

    def _of_nearest(self, shape: LatentShape) -> Sequence[Measurement]:
        """All of the shape whose volume is nearest in proportion, fewest rows first."""

        def distance(other: LatentShape) -> float:
            small, large = sorted((volume(shape), volume(other)))
            return large / small

        nearest = min({m.shape for m in self.measurements}, key=lambda other: (other != shape, distance(other), other))
        return sorted((m for m in self.measurements if m.shape == nearest), key=lambda m: m.rows)


def volume(shape: LatentShape) -> int:
    """Latents in a frame, times frames."""
    return shape.num_frames * shape.height * shape.width


def measure(
    unet: NoisePredictor,
    shapes: Sequence[LatentShape],
    num_tokens: int = 77,
    rows: Sequence[int] = ROWS,
    repeats: int = _REPEATS,
) -> Profile:
    """Time the UNet on random latents, guided ones, with more rows until memory ends or nothing more is gained.

    Of 1 + `repeats` calls of each kind the first counts only where it is the only one.
    """
    measurements: list[Measurement] = []
    for shape in shapes:
        best, in_vain = 0.0, 0
        for number in rows:
            measured = _measure(unet, shape, number, num_tokens, repeats)
            if measured is None:
                break
            measurements.append(measured)
            throughput = number / measured.step_s
            in_vain = in_vain + 1 if throughput < 1.005 * best else 0
            if in_vain == 2:  # one may be an accident, or a number that the GPU likes less
                break
            best = max(best, throughput)
    if not measurements:
        raise OutOfMemory(f"{shapes[0]}: not one row of it fits into memory; use a smaller size or half precision")
    return Profile(device=_device_name(unet), dtype=_dtype_names(unet), measurements=tuple(measurements))


def warm_up(
    unet: NoisePredictor,
    shapes: Sequence[LatentShape],
    profile: Profile,
    num_tokens: int = 77,
    rows: Sequence[int] = ROWS,
    *,
    caches_features: bool = False,
) -> None:
    """Call the UNet once with each number of rows that steps of these shapes will have: no request pays for the first.

    It compiles what is not compiled yet and captures graphs, which `measure` does as well: those of steps that cache
    features, if they do.
    """
    for shape in shapes:
        for number in rows:
            if number <= profile.rows_for(shape):
                _measure(_Caching(unet) if caches_features else unet, shape, number, num_tokens, repeats=0)


class _Caching:
    """A UNet of which each call is one that keeps its features, and one that reuses them."""

    def __init__(self, unet: NoisePredictor) -> None:
        self.config, self.parameters = unet.config, unet.parameters
        self.read_text, self.predict = unet.read_text, unet.predict

    def __call__(self, latents: Tensor, timesteps: Tensor, text: TextKeysValues, rows: Tensor) -> Tensor:
        _, features = self.predict(latents, timesteps, text, rows)
        return self.predict(latents, timesteps, text, rows, features)[0]


@torch.inference_mode()
def _measure(
    unet: NoisePredictor, shape: LatentShape, rows: int, num_tokens: int, repeats: int = _REPEATS
) -> Measurement | None:
    """None where memory does not hold so many rows. The first call counts only where it is the only one."""
    parameter = next(unet.parameters())
    generator = torch.Generator(parameter.device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=parameter.device, dtype=parameter.dtype)

    try:
        with out_of_memory_explained():
            # As many videos as may be, each with its two rows, as most requests have.
            videos = (rows + 1) // 2
            latents = draw(videos, *shape)
            timesteps = torch.full((videos,), 500.0, device=parameter.device)
            video_of_row = torch.tensor([*range(videos), *range(rows - videos)], device=parameter.device)
            text = unet.read_text(draw(rows, num_tokens, unet.config.cross_attention_dim))
            seconds: list[float] = []

            def call_repeatedly() -> None:
                for _ in range(1 + repeats):
                    seconds.append(_seconds(lambda: unet(latents, timesteps, text, video_of_row), parameter.device))

            peak = peak_bytes(call_repeatedly, parameter.device)
    except OutOfMemory:
        return None
    return Measurement(shape=shape, rows=rows, step_s=statistics.median(seconds[1:] or seconds), memory_bytes=peak)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _device_name(unet: NoisePredictor) -> str:
    device = next(unet.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _dtype_names(unet: NoisePredictor) -> str:
    """All that its weights have: more than one where some are in fp8."""
    return ", ".join(sorted({str(parameter.dtype) for parameter in unet.parameters()}))
