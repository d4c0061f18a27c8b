"""The empty settings that scenes are drawn on, with optional clutter that belongs to no category."""

import random

from PIL import Image, ImageDraw

from .pen import Colour, shade


def _vary(colour: Colour, rng: random.Random) -> Colour:
    return shade(colour, rng.uniform(0.88, 1.1))


def _street(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: random.Random) -> None:
    pen.rectangle((0, 0, side, horizon), fill=_vary((165, 205, 235), rng))
    left = 0
    while left < side:
        width = rng.randint(side // 7, side // 4)
        top = rng.randint(side // 12, side // 3)
        wall = _vary(rng.choice(((150, 140, 135), (175, 150, 130), (125, 130, 145))), rng)
        pen.rectangle((left, top, left + width - 2, horizon), fill=wall)
        for x in range(left + 3, left + width - 6, 8):
            for y in range(top + 4, horizon - 6, 10):
                pen.rectangle((x, y, x + 3, y + 4), fill=shade(wall, 0.75))
        left += width
    pen.rectangle((0, horizon, side, horizon + side // 10), fill=_vary((175, 172, 168), rng))
    pen.rectangle((0, horizon + side // 10, side, side), fill=_vary((95, 96, 100), rng))
    for x in range(rng.randint(0, 12), side, side // 5):
        pen.rectangle((x, side * 4 // 5, x + side // 9, side * 4 // 5 + 2), fill=(215, 210, 170))


def _kitchen(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: random.Random) -> None:
    wall = _vary(rng.choice(((235, 225, 195), (215, 230, 215), (225, 215, 225))), rng)
    pen.rectangle((0, 0, side, horizon), fill=wall)
    for y in range(horizon % 11, horizon, 11):
        pen.line((0, y, side, y), fill=shade(wall, 0.92))
    for x in range(0, side, 11):
        pen.line((x, 0, x, horizon), fill=shade(wall, 0.92))
    cupboard = _vary((170, 120, 75), rng)
    for x in range(rng.randint(-10, 0), side, side // 4):
        pen.rectangle((x, 0, x + side // 4 - 3, side // 7), fill=cupboard)
    pen.rectangle((0, horizon, side, side), fill=_vary((190, 150, 110), rng))
    pen.rectangle((0, horizon, side, horizon + side // 16), fill=_vary((110, 85, 65), rng))


def _living_room(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: random.Random) -> None:
    wall = _vary(rng.choice(((205, 185, 160), (190, 200, 190), (195, 185, 205))), rng)
    pen.rectangle((0, 0, side, horizon), fill=wall)
    x = rng.randint(0, side * 2 // 3)
    pen.rectangle((x, side // 10, x + side // 4, side // 3), fill=shade(wall, 0.7))
    pen.rectangle((x + 3, side // 10 + 3, x + side // 4 - 3, side // 3 - 3), fill=_vary((120, 150, 120), rng))
    floor = _vary((150, 105, 70), rng)
    pen.rectangle((0, horizon, side, side), fill=floor)
    for y in range(horizon + 6, side, 9):
        pen.line((0, y, side, y), fill=shade(floor, 0.88))
    rug = (side // 8, horizon + side // 9, side * 7 // 8, side - 4)
    pen.ellipse(rug, fill=_vary(rng.choice(((160, 90, 90), (100, 115, 140), (170, 150, 110))), rng))


def _park(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: random.Random) -> None:
    pen.rectangle((0, 0, side, horizon), fill=_vary((150, 200, 240), rng))
    for _ in range(rng.randint(3, 6)):
        x, size = rng.randint(-8, side), rng.randint(side // 7, side // 4)
        pen.rectangle((x + size // 2 - 2, horizon - size, x + size // 2 + 2, horizon), fill=(105, 75, 50))
        crown = _vary((60, 125, 60), rng)
        pen.ellipse((x, horizon - 2 * size, x + size, horizon - size // 2), fill=crown)
    pen.rectangle((0, horizon, side, side), fill=_vary((120, 180, 85), rng))
    start = rng.randint(0, side)
    pen.polygon(
        (start, horizon, start + 8, horizon, side // 2 + 20, side, side // 2 - 20, side), fill=(205, 185, 140)
    )


def _beach(pen: ImageDraw.ImageDraw, side: int, horizon: int, rng: random.Random) -> None:
    pen.rectangle((0, 0, side, horizon), fill=_vary((170, 215, 245), rng))
    sun = rng.randint(0, side)
    pen.ellipse((sun, 4, sun + side // 9, 4 + side // 9), fill=(250, 230, 130))
    water = _vary((70, 150, 190), rng)
    pen.rectangle((0, horizon - side // 8, side, horizon + side // 7), fill=water)
    for _ in range(6):
        x, y = rng.randint(0, side), rng.randint(horizon - side // 9, horizon + side // 8)
        pen.line((x, y, x + side // 10, y), fill=shade(water, 1.25))
    pen.rectangle((0, horizon + side // 7, side, side), fill=_vary((230, 205, 150), rng))


PAINTERS = {
    "street": _street,
    "kitchen": _kitchen,
    "living room": _living_room,
    "park": _park,
    "beach": _beach,
}


def background(setting: str, side: int, rng: random.Random, clutter: int = 0) -> Image.Image:
    """An empty setting of side x side pixels with `clutter` meaningless blobs."""
    image = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(image)
    PAINTERS[setting](pen, side, round(side * rng.uniform(0.46, 0.56)), rng)
    for _ in range(clutter):
        width, height = rng.randint(side // 20, side // 8), rng.randint(side // 20, side // 8)
        x, y = rng.randint(0, side), rng.randint(side // 3, side)
        colour = (rng.randint(40, 220), rng.randint(40, 220), rng.randint(40, 220))
        corners = (x, y, x + width, y + height)
        if rng.random() < 0.5:
            pen.rectangle(corners, fill=colour)
        else:
            pen.polygon((x, y + height, x + width // 2, y, x + width, y + height), fill=colour)
    return image
