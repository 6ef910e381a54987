"""What the demo's videos show: coloured shapes that move on a plain background."""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["circle", "square", "triangle", "star", "ring", "cross"]
Colour = Literal["red", "green", "blue", "yellow", "orange", "purple", "pink", "white", "black", "gray"]
Motion = Literal[
    "left",
    "right",
    "up",
    "down",
    "up_left",
    "up_right",
    "down_left",
    "down_right",
    "growing",
    "shrinking",
    "spinning",
    "bouncing",
    "still",
]
Size = Literal["small", "medium", "large"]
Place = Literal["centre", "left", "right"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLOURS: tuple[Colour, ...] = get_args(Colour)
MOTIONS: tuple[Motion, ...] = get_args(Motion)
SIZES: tuple[Size, ...] = get_args(Size)

RGB: dict[Colour, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "green": (36, 160, 60),
    "blue": (36, 76, 222),
    "yellow": (244, 222, 40),
    "orange": (246, 138, 24),
    "purple": (136, 48, 180),
    "pink": (250, 150, 196),
    "white": (250, 250, 250),
    "black": (14, 14, 14),
    "gray": (128, 128, 128),
}

_ROUND = ("circle", "ring")  # nobody sees them spin
_IN_PLACE: tuple[Motion, ...] = ("up", "down", "growing", "shrinking", "spinning", "bouncing", "still")
BACKWARD: tuple[Motion, ...] = ("left", "up", "up_left", "down_left", "shrinking")  # another motion's time reversed
_HELD_OUT_SHARE = 10  # one combination in so many is never trained on
_TWO_FIGURES_SHARE = 0.12


@dataclass(frozen=True, slots=True)
class Figure:
    """One shape. Of two in a scene, each keeps to its half."""

    shape: Shape
    colour: Colour
    motion: Motion
    size: Size = "medium"
    place: Place = "centre"


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two figures on a background of another colour."""

    figures: tuple[Figure, ...]
    background: Colour

    @property
    def is_held_out(self) -> bool:
        """Whether this combination of shape, colour, motion and background is kept from training."""
        figure = self.figures[0]
        key = f"{figure.shape} {figure.colour} {figure.motion} {self.background}".encode()
        return len(self.figures) == 1 and hashlib.sha256(key).digest()[0] % _HELD_OUT_SHARE == 0


def random_scene(draw: random.Random) -> Scene:
    """Any scene, held out or not."""
    background = draw.choice(COLOURS)
    colours = [colour for colour in COLOURS if colour != background]
    if draw.random() >= _TWO_FIGURES_SHARE:
        return Scene((_figure(draw, colours, MOTIONS, "centre", draw.choice(SIZES)),), background)
    left = _figure(draw, colours, _IN_PLACE, "left", "small")
    right = _figure(draw, [c for c in colours if c != left.colour], _IN_PLACE, "right", "small")
    return Scene((left, right), background)


def training_scene(draw: random.Random) -> Scene:
    """A scene that is not held out."""
    while (scene := random_scene(draw)).is_held_out:
        pass
    return scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Different scenes of one figure whose combination was never trained on."""
    draw = random.Random(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scene = random_scene(draw)
        if scene.is_held_out:
            scenes[scene] = None
    return list(scenes)


def _figure(
    draw: random.Random, colours: list[Colour], motions: tuple[Motion, ...], place: Place, size: Size
) -> Figure:
    shape = draw.choice(SHAPES)
    motion = draw.choice([m for m in motions if not (m == "spinning" and shape in _ROUND)])
    if motion in ("growing", "shrinking"):
        size = "medium"  # it changes, so it is not said
    return Figure(shape, draw.choice(colours), motion, size, place)
