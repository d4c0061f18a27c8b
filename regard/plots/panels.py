"""Axes for the pictures, in a figure of their own or on a given axis."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from .look import LOOK, numbered

_EDGE = 0.06
"""Inches around all that is in a figure."""


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()


class Panels:
    """Axes in rows and columns: in a new figure, or as parts of a given axis.

    Args:
        ax: the given axis; one panel is the axis itself, several divide it.
        shape: rows and columns.
        size: of a new figure in inches; of a panel, for pictures.
        widths: of the columns, relative to each other; in panels, for pictures.
        gap: inches between panels that divide an axis, across and down.
        right: inches beside such panels that are kept for a colour bar or legend.
        pictures: lay the panels out by their shape, which is known, and fit the figure around them in the end; else the
            figure has its size and the panels give way to their labels.
    """

    def __init__(
        self,
        ax: Axes | None,
        shape: tuple[int, int],
        size: tuple[float, float],
        widths: Sequence[float] | None = None,
        gap: tuple[float, float] = (0.12, 0.4),
        right: float = 0.85,
        pictures: bool = False,
    ) -> None:
        self.shape, self._gap, self._right = shape, gap, right
        self._panel = size if pictures else None
        self._measured = ax is None and pictures
        self._widths = np.asarray(widths or [1] * shape[1], float)
        self.axes: list[Axes] = []
        if ax is None and not pictures:
            self.figure: Figure = NotebookFigure(figsize=size, layout="constrained")
            self._grid = self.figure.add_gridspec(*shape, width_ratios=self._widths)
        elif ax is None:
            ax = self._room(size)
        else:
            self.figure = ax.get_figure()  # type: ignore[assignment]
            while not isinstance(self.figure, Figure):
                self.figure = self.figure.figure
        self._ax = ax
        if ax is not None and shape != (1, 1):
            ax.set_axis_off()

    def _room(self, panel: tuple[float, float]) -> Axes:
        """An axis in a new figure that is as large as the panels, and what is on their right."""
        width = panel[0] * float(self._widths.sum()) + self._gap[0] * (self.shape[1] - 1)
        width += self._right if self.shape != (1, 1) else 0
        height = panel[1] * self.shape[0] + self._gap[1] * (self.shape[0] - 1)
        self.figure = NotebookFigure(figsize=(width, height))
        return self.figure.add_axes((0, 0, 1, 1))

    def done(self) -> Figure:
        """The figure. A new one of pictures is now as large as all that is in it."""
        if self._measured and self._ax is not None:
            width, height = self._inches()
            self.figure.draw_without_rendering()
            box = self.figure.get_tightbbox().padded(_EDGE)
            self.figure.set_size_inches(box.width, box.height)
            place = -box.x0 / box.width, -box.y0 / box.height, width / box.width, height / box.height
            self._ax.set_position(place)
        return self.figure

    def at(self, row: int = 0, column: int = 0, rows: int = 1) -> Axes:
        """A new panel, which may span several rows."""
        if self._ax is None:
            axes = self.figure.add_subplot(self._grid[row : row + rows, column])
        elif self.shape == (1, 1):
            axes = self._ax
        else:
            axes = self._ax.inset_axes(self._bounds(row, column, rows))
        axes.tick_params(labelsize=LOOK["xtick.labelsize"], width=0.6, length=2.5)
        axes.grid(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_fontsize(LOOK["axes.labelsize"])
        self.axes.append(axes)
        return axes

    def _inches(self) -> tuple[float, float]:
        assert self._ax is not None
        box = self._ax.get_window_extent()
        return box.width / self.figure.dpi, box.height / self.figure.dpi

    def _block(self) -> tuple[float, float, float, float, float, float]:
        """Of panels that divide an axis, in inches: a panel's width and height, the gaps, and all panels together."""
        (width, height), (rows, columns) = self._inches(), self.shape
        across, down = min(self._gap[0], 0.1 * width), min(self._gap[1], 0.3 * height)
        wide = (width - min(self._right, 0.3 * width) - across * (columns - 1)) / float(self._widths.sum())
        high = (height - down * (rows - 1)) / rows
        if self._panel is not None:  # as large as its shape lets it be
            scale = min(wide / self._panel[0], high / self._panel[1])
            wide, high = scale * self._panel[0], scale * self._panel[1]
        both = wide * float(self._widths.sum()) + across * (columns - 1), high * rows + down * (rows - 1)
        return wide, high, across, down, *both

    def _bounds(self, row: int, column: int, rows: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a panel as shares of the given axis."""
        wide, high, across, down, _, block = self._block()
        width, height = self._inches()
        left = wide * float(self._widths[:column].sum()) + across * column
        bottom = (height + block) / 2 - (row + rows) * high - (row + rows - 1) * down
        own = rows * high + (rows - 1) * down
        return left / width, bottom / height, wide * float(self._widths[column]) / width, own / height

    def bar(self, image: Any, label: str, clipped: bool = False) -> Any:
        """A colour bar for all panels.

        Args:
            image: what is drawn in its colours.
            label: the quantity and its unit.
            clipped: values above the scale have its last colour.
        """
        full = ScalarMappable(image.norm, image.cmap)  # not as transparent as the image
        how: dict[str, Any] = {"label": label, "extend": "max" if clipped else "neither"}
        if self._ax is None or (self.shape == (1, 1) and self._ax.get_subplotspec()):
            found = self.figure.colorbar(full, ax=self.axes, **how)
        else:
            width, height = self._inches()
            *_, wide, high = self._block() if self.shape != (1, 1) else (width, height)
            place = ((wide + 0.1) / width, (height - high) / 2 / height, 0.1 / width, high / height)
            found = self.figure.colorbar(full, cax=self._ax.inset_axes(place), **how)
        found.outline.set_linewidth(0.6)  # type: ignore[operator]
        found.ax.tick_params(labelsize=LOOK["ytick.labelsize"], width=0.6, length=2.5)
        return found


def head_axes(ax: Axes | None, shape: tuple[int, ...], layers: Sequence[int]) -> tuple[Panels, Axes]:
    """An axis for a map of layers x heads."""
    size = (min(max(0.11 * cells, least), 6) for cells, least in zip(shape, (1.4, 2.2), strict=True))
    high, wide = size
    panels = Panels(ax, (1, 1), (wide + 1.1, high + 0.8))
    axes = panels.at()
    numbered(axes.xaxis, range(shape[1]), "head")
    numbered(axes.yaxis, layers, "layer")
    return panels, axes
