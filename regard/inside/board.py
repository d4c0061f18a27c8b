"""What a page shows: a board on which words light up where they looked, and sections with figures."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..hooks.errors import RegardError

MISSING = (RegardError, ValueError)  # what a model or picture does not have; the page goes on without
DPI = 150
SIDE = 640  # longest side of the picture on the page, in pixels


@dataclass(frozen=True)
class Piece:
    """A run of text: a word with a map (its row in the overlays), or what stands between words."""

    text: str
    row: int | None = None
    wrong: bool = False
    note: str = ""


@dataclass(frozen=True)
class Overlay:
    """Maps of words over the picture.

    Attributes:
        name: what they are.
        maps: (W, S, h, w), not negative: W words, S slices (layers, or steps).
        slices: S names.
        unit: of a value of the maps, for the line below the picture.
        share: values are shares, and shown in percent.
        total: whether the sum of a map means something: the share of the picture.
    """

    name: str
    maps: Tensor
    slices: tuple[str, ...]
    unit: str
    share: bool = True
    total: bool = True

    def packed(self) -> dict[str, Any]:
        """JSON-ready: each map in 256 levels of its own largest value."""
        maps = self.maps.detach().float().cpu()
        peak = maps.amax((2, 3))
        levels = (maps / peak.clamp_min(1e-12)[..., None, None] * 255).round().to(torch.uint8)
        return {
            "name": self.name,
            "grid": list(maps.shape[2:]),
            "slices": list(self.slices),
            "unit": self.unit,
            "share": self.share,
            "peak": _short(peak),
            "total": _short(maps.sum((2, 3))) if self.total else None,
            "levels": base64.b64encode(levels.numpy().tobytes()).decode(),
        }


@dataclass(frozen=True)
class Board:
    """The picture, the text that belongs to it, and the overlays.

    Attributes:
        picture: as it is shown.
        pieces: the text, in order.
        overlays: each with a row for every piece that has one.
        box: (left, top, right, bottom) that the maps cover, as shares of the picture.
        slices: what a slice is called.
        heading: above the board.
    """

    picture: Image.Image
    pieces: Sequence[Piece]
    overlays: Sequence[Overlay]
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    slices: str = "layer"
    heading: str = "Where each word looked"

    def packed(self) -> str:
        """JSON for the page's script."""
        from matplotlib import colormaps

        ramp = (torch.tensor(colormaps["viridis"](range(256))[:, :3]) * 255).round().int()
        value = {
            "overlays": [overlay.packed() for overlay in self.overlays],
            "colours": ramp.flatten().tolist(),
            "slices": self.slices,
        }
        return json.dumps(value, separators=(",", ":"))


@dataclass(frozen=True)
class Drawing:
    """A figure as an image of the page, and what it shows for those who cannot see it."""

    uri: str
    alt: str
    width: int


@dataclass
class Section:
    """A heading, a sentence, and figures; `missing` says why there are none."""

    title: str
    text: str
    drawings: list[Drawing] = field(default_factory=list)
    missing: str = ""


def section(title: str, text: str, *figures: tuple[str, Callable[[], Any]]) -> Section:
    """Draw the figures of a section, each (what it shows, makes it); a model for which one is undefined says so."""
    found = Section(title, text)
    for alt, make in figures:
        try:
            found.drawings.append(drawing(make(), alt))
        except MISSING as error:
            found.missing = str(error)
    return found


def drawing(figure: Any, alt: str) -> Drawing:
    """A matplotlib figure as a PNG inside of the page."""
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    width, _ = figure.get_size_inches()
    return Drawing(_uri(stream.getvalue()), alt, round(96 * width))


def picture_uri(picture: Image.Image) -> str:
    """A picture inside of the page, no larger than need be; small ones are enlarged so that they can be seen."""
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    stream = BytesIO()
    picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(stream, "PNG")
    return _uri(stream.getvalue())


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _short(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]
