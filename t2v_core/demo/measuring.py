"""What a video of the demo's kind shows, measured from its pixels: the check that the model does what it is told."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from t2v_core.demo.drawing import coverage
from t2v_core.demo.scenes import COLOURS, RGB, SHAPES, Colour, Motion, Shape

_FOREGROUND_DISTANCE = 60.0  # in RGB, of a pixel from the background
_MIN_AREA = 0.002  # of the frame: less is no figure
_MOVED = 0.10  # share of the frame's side
_GREW = 1.5  # ratio of areas
_TURNED_IOU = 0.88  # a figure that stays as it was overlaps with itself more than this
_MATCHED_FRAMES = (0, 5, 10, 15)
_ANGLES = 24


@dataclass(frozen=True, slots=True)
class Seen:
    """What was found. None for what cannot be told because there is no figure."""

    background: Colour
    colour: Colour | None
    shape: Shape | None
    motion: Motion | None


def look_at(frames: Tensor) -> Seen:
    """Classify a video of one figure. frames: uint8 (f, h, w, 3)."""
    pixels = frames.float()
    border = torch.cat([pixels[:, :4].flatten(0, 2), pixels[:, -4:].flatten(0, 2), pixels[:, :, :4].flatten(0, 2)])
    ground = border.median(dim=0).values
    background = _nearest(ground, COLOURS)
    masks = ((pixels - ground).norm(dim=-1) > _FOREGROUND_DISTANCE).float()
    areas = masks.mean(dim=(1, 2))
    if areas.median() < _MIN_AREA or areas.min() == 0:
        return Seen(background, None, None, None)
    inner = -torch.nn.functional.max_pool2d(-masks[:, None], 3, stride=1, padding=1)[:, 0]
    figure = pixels[(inner if inner.sum() > 50 else masks) > 0].median(dim=0).values
    colour = _nearest(figure, tuple(c for c in COLOURS if c != background))
    return Seen(background, colour, _shape(masks), _motion(masks))


def _nearest(pixel: Tensor, colours: tuple[Colour, ...]) -> Colour:
    return min(colours, key=lambda colour: (pixel.cpu() - torch.tensor(RGB[colour])).norm().item())


def _centres(masks: Tensor) -> Tensor:
    """The centroid of each mask, in shares of the side: (f, 2), x then y."""
    side = masks.shape[-1]
    places = (torch.arange(side, device=masks.device) + 0.5) / side
    total = masks.sum(dim=(1, 2))
    return torch.stack([(masks.sum(dim=1) @ places) / total, (masks.sum(dim=2) @ places) / total], dim=1)


def _motion(masks: Tensor) -> Motion:
    centres, areas = _centres(masks), masks.mean(dim=(1, 2))
    ratio = (areas[-3:].mean() / areas[:3].mean()).item()
    if ratio > _GREW:
        return "growing"
    if ratio < 1 / _GREW:
        return "shrinking"
    steps = centres.diff(dim=0)
    path_y, moved_y = steps[:, 1].abs().sum().item(), (centres[-1, 1] - centres[0, 1]).item()
    if path_y > 2 * _MOVED and path_y > 1.6 * abs(moved_y):
        return "bouncing"
    dx, dy = (centres[-1] - centres[0]).tolist()
    if math.hypot(dx, dy) > _MOVED:
        names: tuple[Motion, ...] = ("right", "down_right", "down", "down_left", "left", "up_left", "up", "up_right")
        # A diagonal need not be one of 45 degrees: the frame leaves large figures less way than small ones.
        return names[round(math.atan2(dy, dx) / (math.pi / 4)) % 8]
    return "spinning" if _least_overlap(masks) < _TURNED_IOU else "still"


def _least_overlap(masks: Tensor) -> float:
    """Intersection over union of the first frame's figure with each other one's."""
    first = masks[0]
    both, either = (masks * first).sum(dim=(1, 2)), torch.maximum(masks, first).sum(dim=(1, 2))
    return (both / either).min().item()


def _shape(masks: Tensor) -> Shape:
    """The shape that, at some angle, covers the figure best over a few frames."""
    scores = torch.stack([_scores(masks[frame]) for frame in _MATCHED_FRAMES if frame < len(masks)]).mean(dim=0)
    return SHAPES[int(scores.argmax())]


def _scores(mask: Tensor) -> Tensor:
    """For each shape, the best intersection over union with the mask over sizes and angles: (shapes,)."""
    side = mask.shape[-1]
    centre, area = _centres(mask[None])[0], mask.mean()
    angles = torch.arange(_ANGLES, device=mask.device) * (2 * math.pi / _ANGLES)
    best = []
    for kind in range(len(SHAPES)):
        unit = coverage(_paths(torch.tensor([0.5, 0.5]), torch.tensor(0.25), angles[:1]), torch.tensor([kind]), 64)
        radius = 0.25 * (area.cpu() / unit.mean()).sqrt()
        paths = _paths(centre.cpu(), radius, angles.cpu())
        # A shape turns about the middle of its circle, which for a triangle is not its centroid.
        candidates = coverage(paths, torch.tensor([kind]), side)[0]
        offsets = _centres(candidates) - centre.cpu()
        paths = torch.cat([paths[..., :2] - offsets, paths[..., 2:]], dim=-1)
        candidates = coverage(paths, torch.tensor([kind]), side)[0].to(mask.device)
        both = torch.minimum(candidates, mask).sum(dim=(1, 2))
        best.append((both / torch.maximum(candidates, mask).sum(dim=(1, 2))).max())
    return torch.stack(best)


def _paths(centre: Tensor, radius: Tensor, angles: Tensor) -> Tensor:
    """The same figure at each angle: (1, angles, 4)."""
    n = len(angles)
    return torch.cat([centre.expand(n, 2), radius.expand(n, 1), angles.cpu()[:, None]], dim=1)[None]
