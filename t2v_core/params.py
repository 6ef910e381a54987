"""What a caller asks for: one type, validated once, for the library, the command line and the service."""

import copy
import dataclasses
import math
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, get_args

import torch
from torch import Tensor

from t2v_core.config import SAMPLER_NAMES, GenerationDefaults, SamplerName
from t2v_core.errors import InvalidRequest
from t2v_core.media import VideoFormat, check_encoding
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.shapes import SPATIAL_SCALE, VideoShape
from t2v_core.video_input import VideoLimits, cover, read_video

InputVideo = Path | str | bytes | Tensor

MAX_PROMPT_CHARACTERS = 4_000  # the byte-pair encoding of one long word takes quadratic time
MAX_SIDE = 4_096
MAX_FRAMES = 1_024
MAX_FPS = 120
MAX_SEED = 2**32 - 1  # torch's generator on the CPU uses no more bits: larger seeds would be aliases


class Settings(TypedDict, total=False):
    """All that a request may set beside its prompt. What is absent or None takes the checkpoint's default."""

    negative_prompt: str | None
    width: int | None
    height: int | None
    num_frames: int | None
    fps: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    sampler: SamplerName | None
    eta: float | None
    seed: int | None
    strength: float | None
    format: VideoFormat | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GenerationParams:
    """A valid request. Construction raises InvalidRequest for a value or a combination that breaks a rule.

    `video` is the input of video-to-video: uint8 (f, h, w, 3) of this request's own shape. `strength` is the share
    of the noise that it gets, and so of the steps that are run: int(num_inference_steps * strength).
    `eta` is DDIM's; other samplers have none. `seed` decides all noise.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    sampler: SamplerName
    seed: int
    eta: float = 0.0
    strength: float | None = None
    format: VideoFormat = "mp4"
    video: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _check_text("prompt", self.prompt)
        if not self.prompt.strip():
            raise InvalidRequest("prompt is empty: say what the video should show", param="prompt")
        _check_text("negative_prompt", self.negative_prompt)
        for name in ("width", "height"):
            side = getattr(self, name)
            _check_int(name, side, SPATIAL_SCALE, MAX_SIDE)
            if side % SPATIAL_SCALE:
                below = side - side % SPATIAL_SCALE
                raise InvalidRequest(
                    f"{name} {side}: must be a multiple of {SPATIAL_SCALE}; try {below} or {below + SPATIAL_SCALE}",
                    param=name,
                )
        _check_int("num_frames", self.num_frames, 1, MAX_FRAMES)
        check_fps(self.fps)
        _check_int("num_inference_steps", self.num_inference_steps, 1, 999)
        _check_float("guidance_scale", self.guidance_scale, 0.0, 100.0)
        _check_choice("sampler", self.sampler, SAMPLER_NAMES)
        _check_int("seed", self.seed, 0, MAX_SEED)
        _check_float("eta", self.eta, 0.0, 1.0)
        if self.eta and self.sampler != "ddim":
            raise InvalidRequest(
                f"eta {self.eta} with sampler {self.sampler}: only ddim has an eta; leave it out, or use ddim",
                param="eta",
            )
        _check_choice("format", self.format, get_args(VideoFormat))
        check_encoding(self.format, self.fps, crf=None)
        self._check_video()

    def _check_video(self) -> None:
        if self.video is None:
            if self.strength is not None:
                raise InvalidRequest(
                    f"strength {self.strength} without an input video: give a video, or leave strength out",
                    param="strength",
                )
            return
        if self.strength is None:
            raise InvalidRequest("strength is missing: an input video needs one in (0, 1]", param="strength")
        check_strength(self.strength, self.num_inference_steps)
        expected = (*self.shape, 3)
        if tuple(self.video.shape) != expected or self.video.dtype != torch.uint8:
            raise InvalidRequest(
                f"video is {self.video.dtype} {tuple(self.video.shape)}: must be torch.uint8 {expected}, "
                "(frames, height, width, RGB); read_video makes it so",
                param="video",
            )

    @property
    def shape(self) -> VideoShape:
        return VideoShape(self.num_frames, self.height, self.width)

    @property
    def first_step(self) -> int:
        """The first step of the sampler's grid that is run: not 0 for video-to-video."""
        if self.strength is None:
            return 0
        return self.num_inference_steps - int(self.num_inference_steps * self.strength)

    @property
    def num_steps(self) -> int:
        """How many steps are run."""
        return self.num_inference_steps - self.first_step

    def without_frames(self) -> "GenerationParams":
        """The same, with its strength, for stages that do not read the input video."""
        settings = copy.copy(self)
        object.__setattr__(settings, "video", None)
        return settings


@out_of_memory_explained()
def resolve(
    prompt: str,
    settings: Settings,
    defaults: GenerationDefaults,
    video: InputVideo | None = None,
    limits: VideoLimits | None = None,
) -> GenerationParams:
    """The request that these settings make with a checkpoint's defaults. Without a seed, one is drawn.

    Of an input video - a file, its bytes, or frames (f, h, w, 3) - as many frames are taken as are asked for or, where
    nothing is said, up to the checkpoint's own number; `limits` bound what reading a file may cost.
    Raises InvalidRequest, and OutOfMemory where the input does not fit.
    """
    for name in settings:
        if name not in Settings.__annotations__:
            known = ", ".join(Settings.__annotations__)
            raise InvalidRequest(f"{name}: no such setting; there are {known}", param=name)
    given = {name: value for name, value in settings.items() if value is not None}
    given.pop("strength", None)
    strength = settings.get("strength")
    usual = dataclasses.asdict(defaults) | {"negative_prompt": "", "seed": secrets.randbits(32)}
    usual.pop("strength")
    values: dict[str, Any] = usual | given  # Any: each is checked by the type that it is for
    params = GenerationParams(prompt=prompt, strength=strength if video is None else None, **values)
    if video is None:
        return params
    if isinstance(video, Tensor):
        frames = _frames_of(video, settings.get("num_frames") or min(len(video), params.num_frames), params)
    else:
        limits = limits or VideoLimits(max_frames=MAX_FRAMES)
        frames = read_video(
            video,
            width=params.width,
            height=params.height,
            fps=params.fps,
            num_frames=settings.get("num_frames"),
            limits=dataclasses.replace(limits, max_frames=min(limits.max_frames, params.num_frames)),
        )
    strength = defaults.strength if strength is None else strength
    return dataclasses.replace(params, num_frames=len(frames), strength=strength, video=frames)


def check_fps(fps: int) -> None:
    """Raises InvalidRequest for a frame rate that no video has."""
    _check_int("fps", fps, 1, MAX_FPS)


def check_strength(strength: float, num_inference_steps: int | None) -> None:
    """Raises InvalidRequest for a strength that no request can have, or none of so many steps."""
    _check_float("strength", strength, 0.0, 1.0)
    if num_inference_steps is not None and int(num_inference_steps * strength) < 1:
        raise InvalidRequest(
            f"strength {strength} of {num_inference_steps} steps is less than one step: "
            f"use a strength of at least {math.ceil(1e4 / num_inference_steps) / 1e4}, or more steps",
            param="strength",
        )


def _frames_of(video: Tensor, num_frames: int, params: GenerationParams) -> Tensor:
    if video.dtype != torch.uint8 or video.dim() != 4 or video.shape[-1] != 3 or not video.numel():
        raise InvalidRequest(
            f"video is {video.dtype} {tuple(video.shape)}: must be torch.uint8 (frames, height, width, RGB)",
            param="video",
        )
    if len(video) < num_frames:
        raise InvalidRequest(
            f"video has {len(video)} frames and {num_frames} are needed: ask for fewer, or give more", param="video"
        )
    return cover(video[:num_frames].cpu(), params.height, params.width)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} {value!r}: must be text", param=name)
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(
            f"{name} has {len(value)} characters: at most {MAX_PROMPT_CHARACTERS} are allowed; shorten it", param=name
        )


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} {value!r}: must be a whole number from {low} to {high}", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} {value}: must be from {low} to {high}", param=name)


def _check_float(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # nor is NaN between any two
        raise InvalidRequest(f"{name} {value!r}: must be a number from {low:g} to {high:g}", param=name)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidRequest(f"{name} {value!r}: must be one of {', '.join(choices)}", param=name)
