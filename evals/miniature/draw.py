"""Pillow drawings of the 32 categories.

Each drawing fills a transparent tile. It takes the pen, its main colour and a random number generator, and
must be recognisable at 8 to 30 pixels.
"""

import random
from collections.abc import Callable

from PIL import Image

from .pen import PALETTE, Colour, Pen, shade

BLACK, WHITE, GRAY, BROWN = PALETTE["black"], PALETTE["white"], PALETTE["gray"], PALETTE["brown"]
RED, GREEN, YELLOW = PALETTE["red"], PALETTE["green"], PALETTE["yellow"]
GLASS: Colour = (175, 215, 235)
SKIN: tuple[Colour, ...] = ((240, 200, 165), (200, 150, 110), (120, 80, 55))


def _person(pen: Pen, colour: Colour, rng: random.Random) -> None:
    skin, trousers = rng.choice(SKIN), rng.choice(((40, 50, 90), (70, 60, 50), (50, 50, 55)))
    pen.box(trousers, 0.28, 0.58, 0.47, 0.95)
    pen.box(trousers, 0.55, 0.58, 0.74, 0.95)
    pen.box(BLACK, 0.2, 0.95, 0.47, 1)
    pen.box(BLACK, 0.55, 0.95, 0.82, 1)
    pen.box(skin, 0.03, 0.3, 0.18, 0.6)
    pen.box(skin, 0.84, 0.3, 0.99, 0.6)
    pen.box(colour, 0.05, 0.25, 0.95, 0.4)
    pen.box(colour, 0.24, 0.25, 0.78, 0.62)
    pen.oval(skin, 0.28, 0.02, 0.74, 0.24)
    pen.pie(rng.choice((BLACK, BROWN, (190, 150, 70))), 180, 360, 0.24, 0, 0.78, 0.22)


def _car(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.shape(colour, 0.2, 0.42, 0.32, 0.02, 0.7, 0.02, 0.86, 0.42)
    pen.shape(GLASS, 0.27, 0.4, 0.36, 0.12, 0.49, 0.12, 0.49, 0.4)
    pen.shape(GLASS, 0.54, 0.4, 0.54, 0.12, 0.67, 0.12, 0.78, 0.4)
    pen.box(colour, 0, 0.4, 1, 0.8)
    pen.box(YELLOW, 0.93, 0.48, 1, 0.6)
    for left in (0.12, 0.65):
        pen.oval(BLACK, left, 0.58, left + 0.24, 1)
        pen.oval(GRAY, left + 0.07, 0.71, left + 0.17, 0.87)


def _bus(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(colour, 0, 0, 1, 0.86)
    for left in (0.05, 0.27, 0.49):
        pen.box(GLASS, left, 0.14, left + 0.17, 0.46)
    pen.box(shade(GLASS, 0.7), 0.74, 0.14, 0.94, 0.84)
    pen.box(shade(colour, 0.6), 0, 0.58, 0.72, 0.66)
    for left in (0.12, 0.52):
        pen.oval(BLACK, left, 0.72, left + 0.17, 1)


def _bicycle(pen: Pen, colour: Colour, rng: random.Random) -> None:
    for left in (0.0, 0.58):
        pen.arc(BLACK, 0.1, 0, 360, left, 0.42, left + 0.42, 1)
    pen.line(colour, 0.1, 0.21, 0.7, 0.38, 0.3, 0.7, 0.3, 0.5, 0.72, 0.21, 0.7)
    pen.line(colour, 0.1, 0.79, 0.7, 0.68, 0.12)
    pen.line(colour, 0.1, 0.5, 0.72, 0.36, 0.18)
    pen.line(BLACK, 0.12, 0.26, 0.17, 0.46, 0.17)
    pen.line(BLACK, 0.12, 0.6, 0.1, 0.82, 0.06)


def _traffic_light(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box((90, 90, 95), 0.42, 0.6, 0.58, 1)
    pen.box(colour, 0.08, 0, 0.92, 0.66)
    lit = rng.randrange(3)
    for place, lamp in enumerate(((250, 40, 40), (255, 200, 30), (40, 230, 90))):
        top = 0.04 + 0.2 * place
        pen.oval(lamp if place == lit else shade(lamp, 0.55), 0.26, top, 0.74, top + 0.17)


def _stop_sign(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(GRAY, 0.45, 0.5, 0.56, 1)
    outer = (0.3, 0, 0.7, 0, 1, 0.16, 1, 0.38, 0.7, 0.54, 0.3, 0.54, 0, 0.38, 0, 0.16)
    pen.shape(WHITE, *outer)
    inner = [
        0.5 + (n - 0.5) * 0.84 if place % 2 == 0 else 0.27 + (n - 0.27) * 0.84
        for place, n in enumerate(outer)
    ]
    pen.shape(colour, *inner)
    pen.box(WHITE, 0.18, 0.21, 0.82, 0.33)


def _fire_hydrant(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.oval(colour, 0.25, 0, 0.75, 0.4)
    pen.box(colour, 0.25, 0.2, 0.75, 0.9)
    pen.box(colour, 0.02, 0.38, 0.98, 0.58)
    pen.box(shade(colour, 0.6), 0.18, 0.2, 0.82, 0.27)
    pen.box(shade(colour, 0.6), 0.12, 0.88, 0.88, 1)
    pen.oval(GRAY, 0.36, 0.38, 0.64, 0.58)


def _bench(pen: Pen, colour: Colour, rng: random.Random) -> None:
    for top in (0.02, 0.2):
        pen.box(colour, 0, top, 1, top + 0.12)
    pen.box(shade(colour, 0.8), 0, 0.5, 1, 0.66)
    for left in (0.08, 0.84):
        pen.box(BLACK, left, 0.05, left + 0.06, 1)
        pen.box(BLACK, left + 0.03, 0.66, left + 0.09, 1)


def _dog(pen: Pen, colour: Colour, rng: random.Random) -> None:
    dark = shade(colour, 0.65)
    pen.line(colour, 0.13, 0.14, 0.42, 0.02, 0.1)
    for left in (0.12, 0.25, 0.55, 0.66):
        pen.box(dark if left in (0.25, 0.66) else colour, left, 0.6, left + 0.09, 1)
    pen.oval(colour, 0.08, 0.32, 0.78, 0.76)
    pen.oval(colour, 0.6, 0.06, 0.92, 0.5)
    pen.box(colour, 0.8, 0.26, 0.99, 0.46)
    pen.oval(dark, 0.58, 0.06, 0.7, 0.46)
    pen.oval(BLACK, 0.93, 0.24, 1, 0.36)
    pen.oval(WHITE if colour == BLACK else BLACK, 0.78, 0.16, 0.84, 0.24)


def _cat(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.arc(colour, 0.12, 300, 120, 0.68, 0.5, 0.98, 0.98)
    pen.oval(colour, 0.16, 0.42, 0.8, 1)
    pen.shape(colour, 0.12, 0.36, 0.14, 0, 0.4, 0.14)
    pen.shape(colour, 0.74, 0.36, 0.72, 0, 0.46, 0.14)
    pen.oval(colour, 0.1, 0.1, 0.76, 0.56)
    for left in (0.23, 0.51):
        pen.oval((190, 235, 90), left, 0.24, left + 0.14, 0.36)
    pen.oval(PALETTE["pink"], 0.38, 0.38, 0.48, 0.45)
    pen.oval(shade(colour, 1.5), 0.34, 0.62, 0.62, 0.98)


def _bird(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.shape(colour, 0.0, 0.08, 0.34, 0.5, 0.62, 0.5, 0.4, 0.2)
    pen.shape(shade(colour, 0.7), 0.52, 0, 0.36, 0.5, 0.62, 0.55)
    pen.oval(colour, 0.22, 0.42, 0.82, 0.82)
    pen.oval(colour, 0.68, 0.34, 0.92, 0.66)
    pen.shape(YELLOW, 0.88, 0.42, 1, 0.52, 0.88, 0.6)
    pen.shape(shade(colour, 0.7), 0.28, 0.56, 0, 0.7, 0.04, 1, 0.34, 0.78)


def _kite(pen: Pen, colour: Colour, rng: random.Random) -> None:
    other = rng.choice((WHITE, BLACK, GREEN))
    pen.line(GRAY, 0.06, 0.5, 0.6, 0.62, 0.72, 0.4, 0.86, 0.52, 1)
    pen.shape(colour, 0.5, 0, 1, 0.27, 0.5, 0.68, 0, 0.27)
    pen.shape(other, 0.5, 0, 1, 0.27, 0.5, 0.27)
    pen.shape(other, 0, 0.27, 0.5, 0.27, 0.5, 0.68)
    for middle in (0.76, 0.9):
        pen.oval(colour, 0.36, middle - 0.05, 0.66, middle + 0.04)


def _sports_ball(pen: Pen, colour: Colour, rng: random.Random) -> None:
    mark = BLACK if colour == WHITE else WHITE
    pen.oval(shade(colour, 0.75), 0, 0, 1, 1)
    pen.oval(colour, 0.04, 0, 0.96, 0.92)
    pen.shape(mark, 0.5, 0.28, 0.72, 0.45, 0.63, 0.7, 0.37, 0.7, 0.28, 0.45)
    for spot in ((0.42, 0), (0.02, 0.3), (0.82, 0.3), (0.14, 0.74), (0.68, 0.74)):
        pen.oval(mark, spot[0], spot[1], spot[0] + 0.18, spot[1] + 0.18)


def _baseball_bat(pen: Pen, colour: Colour, rng: random.Random) -> None:
    light = (205, 150, 90)
    pen.shape(light, 0.06, 0.98, 0.0, 0.92, 0.55, 0.3, 0.72, 0.46)
    pen.shape(light, 0.45, 0.4, 0.78, 0.02, 0.98, 0.2, 0.62, 0.56)
    pen.oval(light, 0.74, 0, 1, 0.26)
    pen.shape(colour, 0.06, 0.98, 0, 0.92, 0.26, 0.62, 0.36, 0.72)
    pen.oval(colour, 0, 0.86, 0.14, 1)


def _boat(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(BROWN, 0.47, 0, 0.52, 0.76)
    pen.shape(WHITE, 0.54, 0.03, 0.92, 0.64, 0.54, 0.64)
    pen.shape(shade(colour, 0.9), 0.45, 0.14, 0.45, 0.64, 0.16, 0.64)
    pen.shape(BROWN, 0, 0.72, 1, 0.72, 0.84, 1, 0.16, 1)
    pen.shape(colour, 0, 0.72, 1, 0.72, 0.95, 0.81, 0.05, 0.81)


def _surfboard(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.oval(shade(colour, 0.7), 0, 0, 1, 1)
    pen.oval(colour, 0.08, 0.01, 0.92, 0.97)
    pen.box(WHITE, 0.44, 0.04, 0.58, 0.95)
    pen.box(RED, 0.06, 0.44, 0.94, 0.52)


def _umbrella(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(BROWN, 0.47, 0.06, 0.53, 0.96)
    pen.arc(BROWN, 0.06, 0, 180, 0.47, 0.86, 0.65, 1)
    pen.pie(colour, 180, 360, 0, 0.02, 1, 0.9)
    pen.pie(WHITE, 180, 360, 0.24, 0.02, 0.42, 0.9)
    pen.pie(WHITE, 180, 360, 0.6, 0.02, 0.78, 0.9)


def _bottle(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(shade(colour, 0.6), 0.34, 0, 0.66, 0.08)
    pen.box(colour, 0.36, 0.08, 0.64, 0.36)
    pen.oval(colour, 0.06, 0.26, 0.94, 0.56)
    pen.box(colour, 0.06, 0.4, 0.94, 1)
    pen.box((235, 225, 190), 0.06, 0.56, 0.94, 0.8)
    pen.box(shade(colour, 1.5), 0.14, 0.4, 0.26, 0.54)


def _wine_glass(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pale = (215, 232, 240)
    pen.pie(pale, 0, 180, 0.02, -0.5, 0.98, 0.56)
    pen.pie((150, 20, 50), 0, 180, 0.1, -0.16, 0.9, 0.52)
    pen.box(pale, 0.43, 0.54, 0.58, 0.94)
    pen.oval(pale, 0.14, 0.88, 0.86, 1)


def _cup(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.arc(shade(colour, 0.85), 0.13, 0, 360, 0.56, 0.24, 1, 0.78)
    pen.shape(colour, 0, 0.1, 0.76, 0.1, 0.66, 1, 0.1, 1)
    pen.oval(shade(colour, 0.8), 0, 0, 0.76, 0.24)
    pen.oval((80, 50, 30), 0.07, 0.05, 0.69, 0.2)


def _bowl(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.pie(colour, 0, 180, 0, -0.5, 1, 0.96)
    pen.box(shade(colour, 0.7), 0.3, 0.88, 0.7, 1)
    pen.oval(shade(colour, 0.7), 0, 0.06, 1, 0.4)
    pen.oval((225, 175, 110), 0.1, 0.02, 0.9, 0.34)


def _banana(pen: Pen, colour: Colour, rng: random.Random) -> None:
    inner = (0.04, 0.1, 0.2, 0.5, 0.5, 0.68, 0.8, 0.5, 0.92, 0)
    pen.shape(colour, *inner, 1, 0.1, 0.98, 0.6, 0.76, 0.92, 0.45, 1, 0.16, 0.8, 0, 0.3)
    pen.line(shade(colour, 0.75), 0.1, 0.12, 0.6, 0.46, 0.86, 0.84, 0.62)
    pen.box((90, 70, 20), 0.88, 0, 1, 0.14)


def _apple(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.oval(colour, 0, 0.2, 0.6, 0.94)
    pen.oval(colour, 0.4, 0.2, 1, 0.94)
    pen.oval(colour, 0.16, 0.4, 0.84, 1)
    pen.line(BROWN, 0.12, 0.5, 0.34, 0.56, 0.04)
    pen.oval(shade(GREEN, 0.7), 0.58, 0.02, 0.92, 0.2)
    pen.oval(shade(colour, 1.5), 0.14, 0.36, 0.32, 0.56)


def _pizza(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.oval((190, 125, 55), 0, 0, 1, 1)
    pen.oval((245, 205, 90), 0.09, 0.1, 0.91, 0.9)
    for left, top in ((0.2, 0.28), (0.5, 0.14), (0.66, 0.42), (0.4, 0.5), (0.24, 0.58), (0.56, 0.66)):
        pen.oval((195, 45, 30), left, top, left + 0.15, top + 0.2)


def _oven(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(colour, 0, 0, 1, 1)
    pen.box(shade(GRAY, 1.3) if colour != WHITE else (60, 60, 66), 0, 0.02, 1, 0.2)
    for left in (0.08, 0.3, 0.54, 0.76):
        pen.oval(RED, left, 0.04, left + 0.15, 0.17)
    pen.box((70, 35, 20), 0.12, 0.38, 0.88, 0.8)
    pen.box((240, 140, 40), 0.2, 0.54, 0.8, 0.74)
    pen.box(WHITE if colour != WHITE else BLACK, 0.14, 0.28, 0.86, 0.33)


def _refrigerator(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(shade(colour, 0.72), 0, 0, 1, 1)
    pen.box(colour, 0.05, 0.02, 0.95, 0.33)
    pen.box(colour, 0.05, 0.37, 0.95, 0.97)
    pen.box((70, 72, 78), 0.12, 0.12, 0.22, 0.3)
    pen.box((70, 72, 78), 0.12, 0.42, 0.22, 0.68)
    pen.box(rng.choice((RED, YELLOW, PALETTE["blue"])), 0.5, 0.1, 0.68, 0.18)


def _couch(pen: Pen, colour: Colour, rng: random.Random) -> None:
    dark = shade(colour, 0.75)
    pen.box(dark, 0.08, 0, 0.92, 0.6)
    pen.box(colour, 0.14, 0.08, 0.49, 0.54)
    pen.box(colour, 0.52, 0.08, 0.86, 0.54)
    pen.box(shade(colour, 1.2), 0.12, 0.52, 0.88, 0.74)
    pen.box(dark, 0.12, 0.74, 0.88, 0.88)
    pen.oval(colour, 0, 0.3, 0.17, 0.92)
    pen.oval(colour, 0.83, 0.3, 1, 0.92)
    pen.box(BLACK, 0.06, 0.88, 0.12, 1)
    pen.box(BLACK, 0.88, 0.88, 0.94, 1)


def _potted_plant(pen: Pen, colour: Colour, rng: random.Random) -> None:
    dark = shade(colour, 0.7)
    for green, *points in (
        (dark, 0.5, 0.64, 0.0, 0.5, 0.08, 0.2),
        (dark, 0.5, 0.64, 1.0, 0.5, 0.92, 0.2),
        (colour, 0.5, 0.66, 0.14, 0.16, 0.38, 0.06),
        (colour, 0.5, 0.66, 0.86, 0.16, 0.62, 0.06),
        (shade(colour, 1.3), 0.42, 0.66, 0.5, 0.0, 0.58, 0.66),
    ):
        pen.shape(green, *points)  # type: ignore[arg-type]
    pen.shape((175, 85, 45), 0.2, 0.68, 0.8, 0.68, 0.7, 1, 0.3, 1)
    pen.box((200, 100, 55), 0.16, 0.62, 0.84, 0.72)


def _tv(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(colour, 0, 0, 1, 0.84)
    hue = rng.choice(((70, 130, 210), (90, 170, 120), (190, 120, 160)))
    pen.box(hue, 0.05, 0.07, 0.95, 0.76)
    pen.shape(shade(hue, 1.35), 0.1, 0.1, 0.5, 0.1, 0.2, 0.72, 0.1, 0.72)
    pen.box(colour, 0.44, 0.84, 0.56, 0.94)
    pen.box(colour, 0.24, 0.93, 0.76, 1)


def _clock(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.oval(BLACK if colour == WHITE else colour, 0, 0, 1, 1)
    pen.oval(WHITE, 0.1, 0.1, 0.9, 0.9)
    pen.line(BLACK, 0.09, 0.5, 0.5, 0.5, 0.2)
    pen.line(BLACK, 0.09, 0.5, 0.5, rng.choice((0.28, 0.74)), rng.choice((0.44, 0.62)))
    for left, top in ((0.46, 0.1), (0.46, 0.82), (0.1, 0.46), (0.82, 0.46)):
        pen.oval(RED, left, top, left + 0.08, top + 0.08)


def _cell_phone(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(colour, 0, 0, 1, 1)
    pen.box((110, 200, 240), 0.1, 0.1, 0.9, 0.84)
    for row in range(3):
        for column in range(2):
            left, top = 0.2 + 0.36 * column, 0.18 + 0.22 * row
            pen.box(rng.choice((RED, YELLOW, GREEN, WHITE)), left, top, left + 0.22, top + 0.13)
    pen.oval(WHITE, 0.4, 0.87, 0.6, 0.97)


def _laptop(pen: Pen, colour: Colour, rng: random.Random) -> None:
    pen.box(colour, 0.1, 0, 0.9, 0.66)
    pen.box((35, 60, 120), 0.16, 0.07, 0.84, 0.58)
    pen.box((220, 230, 245), 0.22, 0.14, 0.6, 0.24)
    pen.box((220, 230, 245), 0.22, 0.34, 0.74, 0.42)
    pen.shape(shade(colour, 1.25), 0.1, 0.68, 0.9, 0.68, 1, 1, 0, 1)
    pen.shape((60, 60, 66), 0.18, 0.74, 0.82, 0.74, 0.86, 0.88, 0.14, 0.88)


DRAWINGS: dict[str, Callable[[Pen, Colour, random.Random], None]] = {
    "person": _person,
    "car": _car,
    "bus": _bus,
    "bicycle": _bicycle,
    "traffic light": _traffic_light,
    "stop sign": _stop_sign,
    "fire hydrant": _fire_hydrant,
    "bench": _bench,
    "dog": _dog,
    "cat": _cat,
    "bird": _bird,
    "kite": _kite,
    "sports ball": _sports_ball,
    "baseball bat": _baseball_bat,
    "boat": _boat,
    "surfboard": _surfboard,
    "umbrella": _umbrella,
    "bottle": _bottle,
    "wine glass": _wine_glass,
    "cup": _cup,
    "bowl": _bowl,
    "banana": _banana,
    "apple": _apple,
    "pizza": _pizza,
    "oven": _oven,
    "refrigerator": _refrigerator,
    "couch": _couch,
    "potted plant": _potted_plant,
    "tv": _tv,
    "clock": _clock,
    "cell phone": _cell_phone,
    "laptop": _laptop,
}


def draw_object(
    name: str, colour: str, width: int, height: int, rng: random.Random, mirror: bool = False
) -> Image.Image:
    """An RGBA tile of width x height pixels with one object, its colours slightly varied."""
    pen = Pen(max(width, 3), max(height, 3))
    red, green, blue = PALETTE[colour]
    light = rng.uniform(0.88, 1.1)
    # exact palette colours stay comparable inside a drawing (`colour == WHITE`) only without jitter
    base = (red, green, blue) if colour in ("white", "black") else shade((red, green, blue), light)
    DRAWINGS[name](pen, base, rng)
    return pen.tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else pen.tile
