"""Colours, and a pen that draws on a transparent tile in unit coordinates."""

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
PALETTE: dict[str, Colour] = {
    "red": (205, 40, 40),
    "blue": (45, 85, 200),
    "green": (40, 140, 60),
    "yellow": (240, 200, 40),
    "purple": (140, 60, 170),
    "pink": (240, 130, 170),
    "white": (240, 240, 238),
    "black": (35, 35, 40),
    "gray": (140, 142, 148),
    "brown": (130, 82, 45),
}


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor < 1) or lighter (> 1)."""
    return tuple(max(0, min(255, round(part * factor))) for part in colour)  # type: ignore[return-value]


class Pen:
    """Draws in unit coordinates on a transparent tile of a given size in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.tile = Image.new("RGBA", (width, height))
        self.width, self.height = width, height
        self.canvas = ImageDraw.Draw(self.tile)

    def _points(self, numbers: tuple[float, ...]) -> list[float]:
        size = (self.width - 1, self.height - 1)
        return [number * size[place % 2] for place, number in enumerate(numbers)]

    def box(self, colour: Colour, *corners: float) -> None:
        """A filled rectangle: left, top, right, bottom."""
        self.canvas.rectangle(self._points(corners), fill=colour)

    def oval(self, colour: Colour, *corners: float) -> None:
        """A filled ellipse in a box."""
        self.canvas.ellipse(self._points(corners), fill=colour)

    def shape(self, colour: Colour, *points: float) -> None:
        """A filled polygon."""
        self.canvas.polygon(self._points(points), fill=colour)

    def line(self, colour: Colour, thickness: float, *points: float) -> None:
        """A line; the thickness is a fraction of the tile's shorter side."""
        width = max(1, round(thickness * min(self.width, self.height)))
        self.canvas.line(self._points(points), fill=colour, width=width)

    def pie(self, colour: Colour, start: float, end: float, *corners: float) -> None:
        """A filled pie slice of the ellipse in a box, in degrees clockwise from the right."""
        self.canvas.pieslice(self._points(corners), start, end, fill=colour)

    def arc(self, colour: Colour, thickness: float, start: float, end: float, *corners: float) -> None:
        """An arc of the ellipse in a box."""
        width = max(1, round(thickness * min(self.width, self.height)))
        self.canvas.arc(self._points(corners), start, end, fill=colour, width=width)
