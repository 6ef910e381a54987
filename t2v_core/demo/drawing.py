"""Scenes to frames: signed distances of shapes, filled with smooth edges. Batched, on any device."""

import math
import random
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from t2v_core.demo.scenes import RGB, SHAPES, Figure, Scene, Size

NUM_FRAMES = 16
SIDE = 128

_RADII: dict[Size, tuple[float, float]] = {"small": (0.10, 0.13), "medium": (0.16, 0.20), "large": (0.24, 0.28)}
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_MARGIN = 0.02
_MAX_FIGURES = 2


def draw_scenes(scenes: Sequence[Scene], draw: random.Random, device: torch.device | str = "cpu") -> Tensor:
    """One video of each scene, with a size, a start and a speed of its own: uint8 (b, f, h, w, 3)."""
    return draw_with_paths(scenes, draw, device)[0]


def draw_with_paths(
    scenes: Sequence[Scene], draw: random.Random, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The same, and where the figures are: (b, 2, f, 4), centre x and y, radius and angle; zeros for no figure."""
    paths = torch.zeros(len(scenes), _MAX_FIGURES, NUM_FRAMES, 4)
    kinds = torch.zeros(len(scenes), _MAX_FIGURES, dtype=torch.long)
    colours = torch.zeros(len(scenes), _MAX_FIGURES, 3)
    backgrounds = torch.tensor([RGB[scene.background] for scene in scenes], dtype=torch.float32)
    for row, scene in enumerate(scenes):
        for i, figure in enumerate(scene.figures):
            paths[row, i] = torch.tensor(_path(figure, draw))
            kinds[row, i] = SHAPES.index(figure.shape)
            colours[row, i] = torch.tensor(RGB[figure.colour], dtype=torch.float32)
    paths = paths.to(device)
    return _render(paths, kinds.to(device), colours.to(device), backgrounds.to(device)), paths


def _path(figure: Figure, draw: random.Random) -> list[tuple[float, float, float, float]]:
    """Centre x and y, radius and angle in each frame. Lengths are shares of the frame's side."""
    radius = draw.uniform(*_RADII[figure.size])
    low, high = {"centre": (0.0, 1.0), "left": (0.0, 0.5), "right": (0.5, 1.0)}[figure.place]
    times = [i / (NUM_FRAMES - 1) for i in range(NUM_FRAMES)]
    angle = 0.0
    radii = [radius] * NUM_FRAMES
    if figure.motion in ("growing", "shrinking"):
        small, large = draw.uniform(0.07, 0.11), draw.uniform(0.20, 0.23 if figure.place != "centre" else 0.32)
        radii = [small + (large - small) * (t if figure.motion == "growing" else 1 - t) for t in times]
    reach = max(radii) + _MARGIN
    middle = (low + high) / 2
    free_x, free_y = max(0.0, (high - low) / 2 - reach), max(0.0, 0.5 - reach)
    x, y = middle + draw.uniform(-0.6, 0.6) * free_x, 0.5 + draw.uniform(-0.6, 0.6) * free_y

    direction_x = sum(_DIRECTIONS[part][0] for part in figure.motion.split("_") if part in _DIRECTIONS)
    direction_y = sum(_DIRECTIONS[part][1] for part in figure.motion.split("_") if part in _DIRECTIONS)
    if direction_x or direction_y:
        travel_x = direction_x * free_x * draw.uniform(0.75, 1.0)
        travel_y = direction_y * free_y * draw.uniform(0.75, 1.0)
        start_x, end_x = (middle - travel_x, middle + travel_x) if direction_x else (x, x)
        start_y, end_y = (0.5 - travel_y, 0.5 + travel_y) if direction_y else (y, y)
        return [(start_x + (end_x - start_x) * t, start_y + (end_y - start_y) * t, radius, angle) for t in times]
    if figure.motion == "bouncing":
        height, hops, phase = 2 * free_y * draw.uniform(0.7, 1.0), draw.choice((1.5, 2.0, 2.5)), draw.uniform(0.0, 0.3)
        floor = 0.5 + free_y
        return [(x, floor - height * abs(math.sin(math.pi * (hops * t + phase))), radius, angle) for t in times]
    if figure.motion == "spinning":
        turn = draw.choice((-1, 1)) * draw.uniform(0.7, 1.0) * math.pi
        return [(x, y, radius, turn * t) for t in times]
    return [(x, y, r, angle) for r in radii]


def _render(paths: Tensor, kinds: Tensor, colours: Tensor, backgrounds: Tensor) -> Tensor:
    """paths: (b, k, f, 4); kinds: (b, k); colours: (b, k, 3); backgrounds: (b, 3). A radius of 0 draws nothing."""
    canvas = backgrounds[:, None, None, None].expand(-1, paths.shape[2], SIDE, SIDE, -1)
    for i in range(paths.shape[1]):
        cover = coverage(paths[:, i], kinds[:, i], SIDE)[..., None]
        canvas = canvas + (colours[:, i, None, None, None] - canvas) * cover
    return canvas.round().to(torch.uint8)


def coverage(paths: Tensor, kinds: Tensor, side: int) -> Tensor:
    """How much of each pixel a shape covers, 0 to 1. paths: (b, f, 4), kinds: (b,) -> (b, f, side, side)."""
    centres = (torch.arange(side, device=paths.device) + 0.5) / side
    x, y, radius, angle = (rearrange(part, "b f -> b f 1 1") for part in paths.unbind(-1))
    dx, dy = centres[None, None, None, :] - x, centres[None, None, :, None] - y
    scale = radius.clamp(min=1e-6)
    u = (dx * angle.cos() + dy * angle.sin()) / scale
    v = (dy * angle.cos() - dx * angle.sin()) / scale
    distance = torch.empty_like(u)
    for kind, distance_to in enumerate(_DISTANCES):
        rows = kinds == kind
        distance[rows] = distance_to(u[rows], v[rows])
    return (0.5 - distance * scale * side).clamp(0, 1) * (radius > 0)


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 1


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.85


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    """Equilateral, its tip up: the largest distance to one of its three sides."""
    slanted = math.cos(math.pi / 6) * u.abs() - math.sin(math.pi / 6) * v
    return torch.maximum(v, slanted) - 0.55


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points, one of them up. Exact near the edge, which is all that smoothing needs."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(u, -v)
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(u, v)
    px, py = radius * folded.cos(), radius * folded.sin()
    tip, inner = 1.1, 0.45
    notch_x, notch_y = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    edge_x, edge_y = notch_x - tip, notch_y
    return (edge_y * (px - tip) - edge_x * py) / math.hypot(edge_x, edge_y)


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.78).abs() - 0.24


def _cross(u: Tensor, v: Tensor) -> Tensor:
    a, b = u.abs(), v.abs()
    return torch.minimum(torch.maximum(a - 1, b - 0.33), torch.maximum(b - 1, a - 0.33))


_DISTANCES = (_circle, _square, _triangle, _star, _ring, _cross)
