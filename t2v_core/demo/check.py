"""Whether a checkpoint draws what the prompt says: videos of scenes that it never saw, measured from their pixels.

python -m t2v_core.demo.check --num-prompts 200 --sheet sheet.png
"""

import argparse
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from t2v_core.config import Precision
from t2v_core.demo.captions import random_caption
from t2v_core.demo.measuring import Seen, look_at
from t2v_core.demo.scenes import Scene, held_out_scenes
from t2v_core.params import Settings
from t2v_core.pictures import encode_spritesheet
from t2v_core.pipeline import Pipeline, load
from t2v_core.weights import DEMO

logger = logging.getLogger(__name__)

ATTRIBUTES = ("background", "colour", "shape", "motion")

_MAX_PROMPTS = 1000  # the scenes that are held out are about 1900
_MAX_SHOWN = 48
_FRAMES_SHOWN = 4
_VIDEOS_A_ROW = 3


class Checked(NamedTuple):
    """One prompt, what was made of it, and which attributes of it are right."""

    prompt: str
    frames: Tensor
    seen: Seen
    right: dict[str, bool]


def check(
    pipeline: Pipeline, scenes: Sequence[Scene], seed: int = 0, settings: Settings | None = None
) -> Iterator[Checked]:
    """Make a video of each scene, which has one figure, in one of many phrasings that `seed` chooses.

    Each video has its number as its seed. Settings that are not given are the checkpoint's own.
    """
    draw = random.Random(seed)
    for number, scene in enumerate(scenes):
        prompt = random_caption(scene, draw)
        seeded: Settings = {**(settings or {}), "seed": number}
        frames = pipeline.generate(prompt, **seeded).frames
        seen, (figure,) = look_at(frames), scene.figures
        wanted = Seen(scene.background, figure.colour, figure.shape, figure.motion)
        yield Checked(prompt, frames, seen, {name: getattr(seen, name) == getattr(wanted, name) for name in ATTRIBUTES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=DEMO, help="demo, a folder, or a Hugging Face id")
    parser.add_argument("--precision", choices=get_args(Precision), default="exact")
    parser.add_argument("--cached-steps", type=int, default=0)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of scenes and words")
    parser.add_argument("--sheet", type=Path, help="a PNG of the first 48 videos, four frames of each")
    arguments = parser.parse_args()
    if not 1 <= arguments.num_prompts <= _MAX_PROMPTS:
        parser.error(f"--num-prompts {arguments.num_prompts}: must be from 1 to {_MAX_PROMPTS}")
    if arguments.sheet and not arguments.sheet.parent.is_dir():  # not after an hour of work
        parser.error(f"--sheet {arguments.sheet}: there is no folder {arguments.sheet.parent}; create it first")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    scenes = held_out_scenes(arguments.num_prompts, arguments.seed)
    pipeline = load(arguments.model, precision=arguments.precision, cached_steps=arguments.cached_steps)
    counts, shown = Counter[str](), list[Tensor]()
    for number, checked in enumerate(check(pipeline, scenes, arguments.seed), start=1):
        counts.update(name for name, is_right in checked.right.items() if is_right)
        if len(shown) < _MAX_SHOWN:
            picked = torch.linspace(0, len(checked.frames) - 1, _FRAMES_SHOWN).round().long()
            shown.append(checked.frames[picked])
        if not all(checked.right.values()):
            logger.info("%d: %s: seen as %s", number, checked.prompt, checked.seen)
        if number % 20 == 0 or number == len(scenes):
            shares = ", ".join(f"{name} {counts[name] / number:.1%}" for name in ATTRIBUTES)
            logger.info("%d prompts: %s", number, shares)
    if arguments.sheet:
        sheet = torch.cat(shown)
        columns = _VIDEOS_A_ROW * _FRAMES_SHOWN
        arguments.sheet.write_bytes(encode_spritesheet(sheet, format="png", columns=columns, max_frames=len(sheet)))


if __name__ == "__main__":
    main()
