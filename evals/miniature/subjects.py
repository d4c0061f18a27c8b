"""Pictures of one to three large subjects with their captions: what the text-to-image miniature learns from.

A caption of two names both, yet in `NEGLECT` of the pictures only one is drawn, as captions of the web name more
than a picture shows. The pairs of `held_out` are never drawn together in training.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .categories import CATEGORIES, INDEX
from .draw import draw_object
from .language import article
from .pen import shade

SUBJECTS: tuple[str, ...] = (
    "apple", "banana", "car", "clock", "dog", "person", "pizza", "potted plant", "stop sign", "umbrella",
)  # fmt: skip
SIDE = 64
"""Width and height of a picture in pixels."""
NEGLECT = 0.3
"""Share of the two-subject training captions of which one subject is missing in the picture."""
_ZOOM = 2
_ROOMS = (
    ((205, 222, 238), (150, 172, 120)),
    ((232, 222, 200), (176, 140, 105)),
    ((214, 208, 226), (128, 128, 138)),
)


@dataclass(frozen=True)
class Picture:
    """A drawn picture.

    image: (64, 64) RGB. drawn: (subject, colour) of each subject. boxes: (left, top, right, bottom) of each, in pixels.
    """

    image: Image.Image
    drawn: tuple[tuple[str, str], ...]
    boxes: tuple[tuple[float, float, float, float], ...]


def colours(name: str) -> tuple[str, ...]:
    """The colours a category may have."""
    return CATEGORIES[INDEX[name]].colours


def caption(names: Sequence[str]) -> str:
    """`a dog and an apple`."""
    return " and ".join(f"{article(name)} {name}" for name in names)


def held_out(one: str, two: str) -> bool:
    """Whether training never shows the two together (a third of the pairs)."""
    return (SUBJECTS.index(one) + SUBJECTS.index(two)) % 3 == 0


def pairs(only_held_out: bool = False) -> list[tuple[str, str]]:
    """All unordered pairs of subjects, in the order of `SUBJECTS`."""
    every = [(one, two) for i, one in enumerate(SUBJECTS) for two in SUBJECTS[i + 1 :]]
    return [pair for pair in every if held_out(*pair)] if only_held_out else every


def _room(rng: random.Random) -> Image.Image:
    """A wall and a floor, each of one colour."""
    side = SIDE * _ZOOM
    wall, floor = rng.choice(_ROOMS)
    image = Image.new("RGB", (side, side), shade(wall, rng.uniform(0.95, 1.04)))
    line = round(side * rng.uniform(0.62, 0.72))
    ImageDraw.Draw(image).rectangle((0, line, side, side), fill=shade(floor, rng.uniform(0.95, 1.04)))
    return image


def _size(name: str, rng: random.Random) -> tuple[int, int]:
    """Width and height in drawing pixels: the category's own shape, its longer side 24 to 31 pixels."""
    category = CATEGORIES[INDEX[name]]
    longer = rng.uniform(24, 31) * _ZOOM
    factor = longer / max(category.width, category.height)
    return round(category.width * factor), round(category.height * factor)


def draw_picture(
    names: Sequence[str],
    rng: random.Random,
    fixed: Sequence[str | None] | None = None,
    distractors: Sequence[str] = (),
) -> Picture:
    """Draw the subjects side by side on a plain room, in random order; `fixed` names their colours."""
    image = _room(rng)
    tints = [
        (fixed[index] if fixed else None) or rng.choice(colours(name)) for index, name in enumerate(names)
    ]
    slots = [*zip(names, tints, strict=True), *((name, rng.choice(colours(name))) for name in distractors)]
    order = list(range(len(slots)))
    rng.shuffle(order)
    boxes: dict[int, tuple[float, float, float, float]] = {}
    side = SIDE * _ZOOM
    for place, index in enumerate(order):
        width, height = _size(slots[index][0], rng)
        if len(slots) > 2:
            width, height = width * 2 // 3, height * 2 // 3
        lane = side / len(slots)
        left = round(
            min(max(lane * (place + 0.5) - width / 2 + rng.uniform(-0.1, 0.1) * side, 0), side - width)
        )
        top = round(side * rng.uniform(0.72, 0.94)) - height
        tile = draw_object(*slots[index], width, height, rng, mirror=rng.random() < 0.5)
        image.paste(tile, (left, top), tile)
        boxes[index] = tuple(edge / _ZOOM for edge in (left, top, left + width, top + height))  # type: ignore[assignment]
    kept = tuple(boxes[index] for index in range(len(names)))
    return Picture(image.reduce(_ZOOM), tuple(zip(names, tints, strict=True)), kept)


def training_example(seed: int) -> tuple[np.ndarray, str]:
    """A (64, 64, 3) uint8 picture and its caption; half the captions name two subjects."""
    rng = random.Random(f"t2i/{seed}")
    names = [rng.choice(SUBJECTS)]
    if rng.random() < 0.5:
        names.append(
            rng.choice([name for name in SUBJECTS if name != names[0] and not held_out(name, names[0])])
        )
    shown = rng.sample(names, 1) if len(names) > 1 and rng.random() < NEGLECT else names
    return np.asarray(draw_picture(shown, rng).image), caption(names)
