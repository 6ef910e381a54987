"""Many ways to say what a scene shows."""

import random

from t2v_core.demo.scenes import Colour, Figure, Motion, Scene

_DIRECTIONS: dict[Motion, tuple[str, ...]] = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up_left": ("diagonally up and left", "up and to the left", "diagonally to the upper left"),
    "up_right": ("diagonally up and right", "up and to the right", "diagonally to the upper right"),
    "down_left": ("diagonally down and left", "down and to the left", "diagonally to the lower left"),
    "down_right": ("diagonally down and right", "down and to the right", "diagonally to the lower right"),
}
_VERBS = ("moving", "moving", "going", "sliding", "drifting", "that moves")
_MOTIONS: dict[Motion, tuple[str, ...]] = {
    **{motion: tuple(f"{verb} {way}" for verb in _VERBS for way in ways) for motion, ways in _DIRECTIONS.items()},
    "growing": ("growing", "getting bigger", "becoming larger", "expanding", "that grows"),
    "shrinking": ("shrinking", "getting smaller", "becoming smaller", "contracting", "that shrinks"),
    "spinning": ("spinning", "rotating", "turning around", "spinning around", "that spins"),
    "bouncing": ("bouncing", "bouncing up and down", "hopping", "jumping up and down", "that bounces"),
    "still": ("standing still", "not moving", "staying still", "at rest", "that does not move"),
}
_SIZES = {"small": ("small", "little", "tiny"), "medium": ("",), "large": ("large", "big", "huge")}
_PLACES = {"centre": ("",), "left": ("on the left",), "right": ("on the right",)}


def plain_caption(scene: Scene) -> str:
    """The scene in its plainest words, the same each time."""
    figures = [
        _words("a", _SIZES[f.size][0], f.colour, f.shape, _MOTIONS[f.motion][0], _PLACES[f.place][0])
        for f in scene.figures
    ]
    return f"{' and '.join(figures)} on {_words('a', scene.background)} background"


def random_caption(scene: Scene, draw: random.Random) -> str:
    """The scene in one of many phrasings."""
    figures = " and ".join(_figure(figure, draw) for figure in scene.figures)
    background = _background(scene.background, draw)
    caption = draw.choice(
        (
            f"{figures} on {background}",
            f"{figures} on {background}",
            f"{figures} over {background}",
            f"{figures} in front of {background}",
            f"on {background}, {figures}",
            f"{background} with {figures}",
            f"{draw.choice(('a video of', 'an animation of', 'a clip of'))} {figures} on {background}",
        )
    )
    return caption + draw.choice(("", "", "."))


def _figure(figure: Figure, draw: random.Random) -> str:
    article = draw.choice(("a", "a", "a", "the", ""))
    size, motion = draw.choice(_SIZES[figure.size]), draw.choice(_MOTIONS[figure.motion])
    place = draw.choice(_PLACES[figure.place])
    return _words(article, size, figure.colour, figure.shape, motion, place)


def _background(colour: Colour, draw: random.Random) -> str:
    known = f"{_words('a', colour)} background"
    return draw.choice((known, known, f"a plain {colour} background", colour))


def _words(article: str, *words: str) -> str:
    text = " ".join(word for word in words if word)
    if article == "a" and text[0] in "aeiou":
        article = "an"
    return f"{article} {text}".strip()
