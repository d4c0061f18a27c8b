"""A procedural COCO: scenes of everyday objects in five settings, drawn with Pillow.

Every scene follows from (seed, split, difficulty) alone. Objects keep company as in photographs - an oven
with a refrigerator, a surfboard with an umbrella - so that a model trained on them acquires priors which can
mislead it.
"""

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from .backgrounds import background
from .categories import CATEGORIES, COMPANIONS, INDEX, NAMES, SETTINGS, Category
from .draw import draw_object

SIDE = 64
"""Width and height of a scene in pixels."""
_ZOOM = 2  # scenes are drawn at twice the size and averaged down, which smooths edges
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Difficulty:
    """How hard a scene is to see.

    objects: fewest and most objects. scale: range of the size factor. overlap: largest share of an object
    that may cover, or be covered by, another when placed. clutter: most meaningless blobs. noise: standard deviation
    of pixel noise (0 to 255). stray: chance that an object ignores the setting. repeat: chance that a
    category comes twice.
    """

    objects: tuple[int, int] = (3, 7)
    scale: tuple[float, float] = (0.5, 1.05)
    overlap: float = 0.4
    clutter: int = 4
    noise: float = 6.0
    stray: float = 0.05
    repeat: float = 0.12


DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty((2, 5), (0.9, 1.2), 0.15, 0, 2.0, 0.3, 0.05),
    "standard": Difficulty(),
    "hard": Difficulty((4, 8), (0.4, 0.85), 0.55, 6, 10.0, 0.05, 0.12),
}
"""The miniatures are trained on easy and standard scenes; benchmarks take hard ones, where seeing is uncertain."""


@dataclass(frozen=True)
class SceneObject:
    """One visible object: bbox is (left, top, width, height) and area its visible pixels, both at 64x64."""

    category: str
    colour: str
    bbox: tuple[float, float, float, float]
    area: float
    visibility: float

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        left, top, width, height = self.bbox
        return left + width / 2, top + height / 2


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    objects: annotated objects, largest first. hidden: categories drawn but too covered to be annotated.
    owners: (64, 64) int8, the category index that owns each pixel, -1 for background.
    """

    seed: int
    split: str
    setting: str
    image: Image.Image
    objects: tuple[SceneObject, ...]
    hidden: frozenset[str]
    owners: np.ndarray

    @property
    def categories(self) -> tuple[str, ...]:
        """Distinct annotated categories, largest object first."""
        return tuple(dict.fromkeys(item.category for item in self.objects))


def _choose(setting: str, level: Difficulty, rng: random.Random) -> list[str]:
    """Names of the objects to draw, each drawn given the ones before."""
    weights = SETTINGS[setting]
    chosen: list[str] = []
    count = rng.randint(*level.objects)
    while len(chosen) < count:
        if chosen and rng.random() < level.repeat:
            chosen.append(rng.choice(chosen))
            continue
        odds = []
        stray = rng.random() < level.stray
        for name in NAMES:
            weight = 1.0 if stray else weights.get(name, 0.0)
            for other in chosen:
                weight *= COMPANIONS.get(frozenset((name, other)), 1.0)
            odds.append(0.0 if name in chosen else weight)
        chosen.append(rng.choices(NAMES, odds)[0])
    return chosen


def _place(
    category: Category, boxes: list[tuple[int, int, int, int]], level: Difficulty, rng: random.Random
) -> tuple[int, int, int, int]:
    """A box (left, top, width, height) in drawing pixels; the least overlapping of a few tries."""
    side = SIDE * _ZOOM
    best, least = (0, 0, 8, 8), float("inf")
    scale = rng.uniform(*level.scale)
    for _ in range(12):
        stretch = rng.uniform(0.92, 1.08)
        width = max(8, round(category.width * _ZOOM * scale * stretch))
        height = max(8, round(category.height * _ZOOM * scale / stretch))
        bottom = min(side, round(side * rng.uniform(category.top, category.bottom)))
        box = (rng.randint(0, max(0, side - width)), max(0, bottom - height), width, height)
        worst = max((_overlap(box, other) for other in boxes), default=0.0)
        if worst <= level.overlap:
            return box
        if worst < least:
            best, least = box, worst
    return best


def _overlap(one: tuple[int, int, int, int], two: tuple[int, int, int, int]) -> float:
    """Intersection over the smaller box."""
    width = min(one[0] + one[2], two[0] + two[2]) - max(one[0], two[0])
    height = min(one[1] + one[3], two[1] + two[3]) - max(one[1], two[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min(one[2] * one[3], two[2] * two[3])


def _annotate(
    drawn: list[tuple[Category, str, int]], owner: np.ndarray
) -> tuple[list[SceneObject], frozenset[str]]:
    """Objects still visible in the owner map (128, 128), and the categories that are not."""
    items, hidden = [], set()
    for number, (category, colour, pixels) in enumerate(drawn):
        mine = owner == number
        rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        seen = int(mine.sum())
        visibility = seen / max(pixels, 1)
        if visibility < 0.4 or seen < 12 * _ZOOM**2:
            hidden.add(category.name)
            continue
        left, top = columns[0] / _ZOOM, rows[0] / _ZOOM
        size = ((columns[-1] + 1) / _ZOOM - left, (rows[-1] + 1) / _ZOOM - top)
        box = (float(left), float(top), float(size[0]), float(size[1]))
        items.append(SceneObject(category.name, colour, box, seen / _ZOOM**2, round(visibility, 3)))
    items.sort(key=lambda item: -item.area)
    return items, frozenset(hidden - {item.category for item in items})


def make_scene(
    seed: int, split: Split = "test", difficulty: str | Difficulty = "standard", setting: str | None = None
) -> Scene:
    """Draw the scene of this seed. Splits never share a scene; `setting` fixes one of the five settings."""
    level = DIFFICULTIES[difficulty] if isinstance(difficulty, str) else difficulty
    rng = random.Random(f"{split}/{difficulty if isinstance(difficulty, str) else level}/{seed}")
    place = setting or rng.choice(tuple(SETTINGS))
    side = SIDE * _ZOOM
    image = background(place, side, rng, rng.randint(0, level.clutter))
    boxes: list[tuple[int, int, int, int]] = []
    plan = []
    for name in _choose(place, level, rng):
        category = CATEGORIES[INDEX[name]]
        box = _place(category, boxes, level, rng)
        boxes.append(box)
        plan.append((box[1] + box[3], category, box))
    owner = np.full((side, side), -1, np.int8)
    drawn: list[tuple[Category, str, int]] = []
    for number, (_, category, box) in enumerate(sorted(plan, key=lambda entry: entry[0])):
        colour = rng.choices(category.colours, [2.0] + [1.0] * (len(category.colours) - 1))[0]
        tile = draw_object(category.name, colour, box[2], box[3], rng, mirror=rng.random() < 0.5)
        image.paste(tile, box[:2], tile)
        alpha = np.asarray(tile)[..., 3] > 127
        window = owner[box[1] : box[1] + box[3], box[0] : box[0] + box[2]]
        alpha = alpha[: window.shape[0], : window.shape[1]]
        window[alpha] = number
        drawn.append((category, colour, int(alpha.sum())))
    objects, hidden = _annotate(drawn, owner)
    table = np.array([INDEX[category.name] for category, _, _ in drawn] + [-1], np.int8)
    pixels = np.asarray(image.reduce(_ZOOM), np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0.0, level.noise, pixels.shape)
    final = Image.fromarray(np.clip(pixels + noise + 0.5, 0, 255).astype(np.uint8))
    return Scene(seed, split, place, final, tuple(objects), hidden, table[owner[::_ZOOM, ::_ZOOM]])
