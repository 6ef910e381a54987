"""A finished video: its frames, and what they were made from."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from t2v_core.media import encode_video, save_video
from t2v_core.params import GenerationParams, check_fps


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """frames: uint8 (f, h, w, 3), RGB, on the CPU. `model` is the checkpoint that made them."""

    frames: Tensor = field(repr=False)
    params: GenerationParams
    model: str

    def save(self, path: str | Path, *, crf: int | None = None) -> Path:
        """Write an .mp4, .webm or .gif, by the path's suffix. A lower `crf` is larger and closer to the frames.

        Raises OutputError, or InvalidRequest for another suffix; what was at the path before is still there then.
        """
        return save_video(self.frames, Path(path), fps=self.params.fps, crf=crf, metadata=self.metadata())

    def encode(self, *, crf: int | None = None) -> bytes:
        """The same as bytes, in the format that the request asked for."""
        params = self.params
        return encode_video(self.frames, fps=params.fps, format=params.format, crf=crf, metadata=self.metadata())

    def frames_at(self, fps: int) -> Tensor:
        """The frames that are seen at another rate, of which there are more or fewer in the same time.

        Raises InvalidRequest for a rate that no video has.
        """
        check_fps(fps)
        if fps == self.params.fps:
            return self.frames
        seen = torch.arange(max(1, round(len(self.frames) * fps / self.params.fps))) * self.params.fps // fps
        return self.frames[seen]

    def metadata(self) -> dict[str, str]:
        """What is written into the file, so that it says where it comes from."""
        settings = {
            setting.name: getattr(self.params, setting.name)
            for setting in dataclasses.fields(self.params)
            if setting.name not in ("prompt", "video", "format")
        }
        return {
            "title": self.params.prompt,
            "comment": "AI-generated video",
            # IPTC's term for media made by a trained model.
            "digital_source_type": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
            "model": self.model,
            "seed": str(self.params.seed),
            "settings": json.dumps(settings),
        }
