"""Pictures and what lies on them: which pixels a map covers, heat, outlines, and the names of regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from scipy import ndimage
from torch import Tensor

from ..interventions.vlsam_points import seen_box
from .look import HEAT, RED, cased, titled
from .panels import Panels

_FAINT = 0.15, 0.8
"""Black and white of a picture under heat: what is left of its contrast does not pass for heat."""


@dataclass(frozen=True)
class Seen:
    """A picture and the part of it that the model saw.

    Attributes:
        pixels: (H, W, 3) from 0 to 1.
        box: left, top, right, bottom in pixels.
    """

    pixels: np.ndarray
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, picture: Any, processor: Any = None) -> Seen:
        """A picture, of which the processor may cut the middle out.

        Args:
            picture: PIL, (H, W, 3) or (H, W) array, (3, H, W) or (1, 3, H, W) tensor; 0 to 255 or 0 to 1.
            processor: the model's; None shows it the whole picture.
        """
        pixels = _pixels(picture)
        height, width = pixels.shape[:2]
        box = (0.0, 0.0, float(width), float(height))
        return cls(pixels, box if processor is None else seen_box(processor, width, height))

    @property
    def ratio(self) -> float:
        """Height over width of the room for the picture, from 1/2 to 3/2."""
        return min(max(self.pixels.shape[0] / self.pixels.shape[1], 0.5), 1.5)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Of a map, for imshow: left, right, bottom, top, where pixel i reaches from i - 0.5 to i + 0.5."""
        left, top, right, bottom = (edge - 0.5 for edge in self.box)
        return left, right, bottom, top

    def show(self, axes: Axes, title: str = "") -> None:
        """The picture as it is; dashed around what the model saw, where that is a part."""
        axes.imshow(self.pixels, vmin=0, vmax=1)
        self._frame(axes, title)

    def heat(self, axes: Axes, field: np.ndarray, top: float, title: str = "") -> Any:
        """A map (h, w) over the picture in faint grey, in colours from 0 to `top`."""
        grey = self.pixels @ np.array([0.299, 0.587, 0.114])
        dark, light = _FAINT
        axes.imshow(dark + (light - dark) * grey, cmap="gray", vmin=0, vmax=1)
        drawn = axes.imshow(
            field, cmap=HEAT, vmin=0, vmax=top, alpha=0.65, extent=self.extent, interpolation="nearest"
        )
        self._frame(axes, title)
        return drawn

    def outline(self, axes: Axes, chosen: np.ndarray, colour: str = RED, width: float = 1.1) -> None:
        """A rectangle around each chosen place of a map (h, w) bool."""
        left, right, bottom, top = self.extent
        high, wide = (bottom - top) / chosen.shape[0], (right - left) / chosen.shape[1]
        places = [
            Rectangle((left + column * wide, top + row * high), wide, high)
            for row, column in np.argwhere(chosen)
        ]
        lines = PatchCollection(places, facecolor="none", edgecolor=colour, linewidth=width, zorder=3)
        lines.set_path_effects(cased(width + 1.4))
        axes.add_collection(lines)

    def region(self, axes: Axes, chosen: np.ndarray, name: str, colour: str, hatch: str) -> None:
        """A region (h, w) bool of the whole picture: filled, hatched, outlined, with its name in its widest part."""
        high, wide = (side / cells for side, cells in zip(self.pixels.shape, chosen.shape, strict=False))

        def place(points: Any) -> np.ndarray:
            return np.asarray(points, float) * (wide, high) - 0.5

        runs = _runs(chosen)
        path = Path.make_compound_path(*(Path(place(run), closed=True) for run in runs))
        axes.add_patch(PathPatch(path, facecolor=colour, alpha=0.3, linewidth=0))
        axes.add_patch(PathPatch(path, fill=False, edgecolor=colour, hatch=hatch, linewidth=0))
        edges = [place(edge) for edge in _edges(chosen)]
        lines = LineCollection(edges, colors=colour, linewidths=1.4, capstyle="projecting", zorder=3)
        lines.set_path_effects(cased(2.6))
        axes.add_collection(lines)
        depth = ndimage.distance_transform_edt(np.pad(chosen, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        x, y = place((column + 0.5, row + 0.5))
        box = {"facecolor": "white", "edgecolor": colour, "linewidth": 0.8, "boxstyle": "round,pad=0.2"}
        axes.text(x, y, name, ha="center", va="center", color="black", bbox=box, zorder=4, fontsize=8)

    def _frame(self, axes: Axes, title: str) -> None:
        height, width = self.pixels.shape[:2]
        left, top, right, bottom = self.box
        if (left, top, right, bottom) != (0, 0, width, height):
            how: dict[str, Any] = {"fill": False, "linewidth": 0.9, "linestyle": (0, (3, 2)), "zorder": 2}
            patch = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, edgecolor="black", **how)
            patch.set_path_effects(cased(1.8))
            axes.add_patch(patch)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
        titled(axes, title)


def beside(seen: Seen, count: int, ax: Axes | None) -> Panels:
    """Panels in a row, of the shape of the picture."""
    side = 2.1
    return Panels(ax, (1, count), (side, side * seen.ratio), pictures=True)


def _pixels(picture: Any) -> np.ndarray:
    if isinstance(picture, Tensor):
        picture = picture[0] if picture.ndim == 4 and len(picture) == 1 else picture
        picture = picture.movedim(0, -1) if picture.ndim == 3 and len(picture) in (1, 3) else picture
        picture = picture.detach().float().cpu().numpy()
    elif hasattr(picture, "convert"):
        picture = picture.convert("RGB")
    array = np.asarray(picture, float)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise ValueError(
            f"a picture is PIL, an array (H, W, 3) or a tensor (3, H, W), got {type(picture).__name__} of shape "
            f"{array.shape}: pass one picture"
        )
    low, top = array.min(), array.max()
    if not (low >= 0 and top <= 255):
        raise ValueError(
            f"a picture's values are 0 to 1 or 0 to 255, got {low:.3g} to {top:.3g}: pass the picture that the "
            "processor was given, not its pixel_values"
        )
    array = array / 255 if top > 1 else array
    return np.broadcast_to(array[..., :3], (*array.shape[:2], 3))


def _runs(chosen: np.ndarray) -> list[list[tuple[int, int]]]:
    """Rectangles, corner by corner, that cover the chosen cells: each run of a row is one."""
    steps = np.diff(np.pad(chosen, ((0, 0), (1, 1))).astype(int), axis=1)
    starts, ends = np.argwhere(steps == 1), np.argwhere(steps == -1)[:, 1]
    return [
        [(start, row), (end, row), (end, row + 1), (start, row + 1), (start, row)]
        for (row, start), end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


def _edges(chosen: np.ndarray) -> list[list[tuple[int, int]]]:
    """The sides of cells between chosen and others, as lines from corner to corner."""
    padded = np.pad(chosen, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1]).tolist()
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1]).tolist()
    return [[(x, y), (x + 1, y)] for y, x in across] + [[(x, y), (x, y + 1)] for y, x in down]
