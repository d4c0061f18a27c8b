"""One look for all pictures: colours, sizes, and axes that lie in a figure of their own or on a given axis."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, RED, PURPLE, BLACK = "#E69F00", "#D55E00", "#CC79A7", "#000000"
"""Okabe and Ito's colours, which people with any kind of colour vision tell apart."""
CATEGORIES = (ORANGE, BLUE, GREEN, RED, SKY, PURPLE, YELLOW, BLACK)
HATCHES = ("//", "..", "\\\\", "xx", "--", "++", "||", "oo")
HEAT = "viridis"
"""Its lightness only grows, so that it is read in print and with any kind of colour vision."""

_LOOK: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "figure.dpi": 130,
    "hatch.linewidth": 0.6,
    "axes.linewidth": 0.6,
}
P = ParamSpec("P")


class NotebookFigure(Figure):
    """A figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()


def drawn(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """The function with our look, whatever style is set; the style is as it was afterwards."""

    @wraps(function)
    def with_look(*args: P.args, **kwargs: P.kwargs) -> Figure:
        ax = kwargs.get("ax")
        if ax is not None and not isinstance(ax, Axes):
            raise ValueError(f"ax is one matplotlib axis, got {type(ax).__name__}: pass one of its axes")
        with matplotlib.style.context(_LOOK, after_reset=True):
            return function(*args, **kwargs)

    return with_look


class Panels:
    """Axes in rows and columns: in a new figure, or as parts of a given axis.

    Args:
        ax: the given axis; one panel is the axis itself, several divide it.
        shape: rows and columns.
        size: of a new figure in inches; with `margins`, of a panel.
        widths: of the columns; with `margins`, in panels.
        gap: inches between panels that divide an axis, across and down.
        right: inches beside such panels that are kept for a colour bar or legend.
        margins: inches around the panels of a new figure: left, bottom and top. Panels are laid out by them and by
            `gap`, as pictures need, whose shape is known; else by their labels.
    """

    def __init__(
        self,
        ax: Axes | None,
        shape: tuple[int, int],
        size: tuple[float, float],
        widths: Sequence[float] | None = None,
        gap: tuple[float, float] = (0.12, 0.4),
        right: float = 0.85,
        margins: tuple[float, float, float] | None = None,
    ) -> None:
        self.shape, self._gap, self._right = shape, gap, right
        self._widths = np.asarray(widths or [1] * shape[1], float)
        self.axes: list[Axes] = []
        if ax is None and margins is None:
            self.figure: Figure = NotebookFigure(figsize=size, layout="constrained")
            self._grid = self.figure.add_gridspec(*shape, width_ratios=self._widths)
        elif ax is None:
            ax = self._measured(size, margins or (0, 0, 0))
        else:
            self.figure = ax.get_figure()  # type: ignore[assignment]
            while not isinstance(self.figure, Figure):
                self.figure = self.figure.figure
        self._ax = ax
        if ax is not None and shape != (1, 1):
            ax.set_axis_off()

    def _measured(self, panel: tuple[float, float], margins: tuple[float, float, float]) -> Axes:
        """An axis in a new figure that is as large as the panels, and what is on their right."""
        left, bottom, top = margins
        wide = panel[0] * float(self._widths.sum()) + self._gap[0] * (self.shape[1] - 1)
        high = panel[1] * self.shape[0] + self._gap[1] * (self.shape[0] - 1)
        width, height = left + wide + self._right, bottom + high + top
        self.figure = NotebookFigure(figsize=(width, height))
        inner = wide if self.shape == (1, 1) else wide + self._right
        return self.figure.add_axes((left / width, bottom / height, inner / width, high / height))

    def at(self, row: int = 0, column: int = 0, rows: int = 1) -> Axes:
        """A new panel, which may span several rows."""
        if self._ax is None:
            axes = self.figure.add_subplot(self._grid[row : row + rows, column])
        elif self.shape == (1, 1):
            axes = self._ax
        else:
            axes = self._ax.inset_axes(self._bounds(row, column, rows))
        axes.tick_params(labelsize=_LOOK["xtick.labelsize"], width=0.6, length=2.5)
        axes.grid(False)
        self.axes.append(axes)
        return axes

    def _inches(self) -> tuple[float, float]:
        assert self._ax is not None
        box = self._ax.get_window_extent()
        return box.width / self.figure.dpi, box.height / self.figure.dpi

    def _end(self) -> float:
        """Where the panels end, as a share of the given axis."""
        return 1 - min(0.3, self._right / self._inches()[0])

    def _bounds(self, row: int, column: int, rows: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height as shares of the given axis."""
        width, height = self._inches()
        across, down = (min(gap / side, 0.1) for gap, side in zip(self._gap, (width, height), strict=True))
        free = self._end() - across * (self.shape[1] - 1)
        wide = free * self._widths / self._widths.sum()
        high = (1 - down * (self.shape[0] - 1)) / self.shape[0]
        left = float(wide[:column].sum()) + across * column
        bottom = 1 - (row + rows) * high - (row + rows - 1) * down
        return left, bottom, float(wide[column]), rows * high + (rows - 1) * down

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
            thin = 0.1 / self._inches()[0]
            left = (1 if self.shape == (1, 1) else self._end()) + thin
            found = self.figure.colorbar(full, cax=self._ax.inset_axes((left, 0, thin, 1)), **how)
        found.outline.set_linewidth(0.6)  # type: ignore[operator]
        found.ax.tick_params(labelsize=_LOOK["ytick.labelsize"], width=0.6, length=2.5)
        return found


def numbered(axis: Any, names: Sequence[Any], label: str) -> None:
    """An axis at 0, 1, 2, ... with a name for each place, of which as many are written as fit."""
    axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10], min_n_ticks=1))
    axis.set_major_formatter(
        FuncFormatter(lambda at, _: str(names[round(at)]) if 0 <= round(at) < len(names) else "")
    )
    axis.set_label_text(label)


def head_axes(ax: Axes | None, shape: tuple[int, ...], layers: Sequence[int]) -> tuple[Panels, Axes]:
    """An axis for a map of layers x heads."""
    size = (min(max(0.11 * cells, least), 6) for cells, least in zip(shape, (1.4, 2.2), strict=True))
    high, wide = size
    panels = Panels(ax, (1, 1), (wide + 1.1, high + 0.8))
    axes = panels.at()
    numbered(axes.xaxis, range(shape[1]), "head")
    numbered(axes.yaxis, layers, "layer")
    return panels, axes


def cased(width: float, colour: str = "white") -> list[Any]:
    """Path effects that set a line or letters off from whatever is below."""
    return [withStroke(linewidth=width, foreground=colour)]


def values(what: str, tensor: Tensor, dims: int, shape: str) -> np.ndarray:
    """The tensor as an array on the CPU.

    Raises:
        ValueError: another number of dimensions than `dims`, nothing in it, or values that are not finite.
    """
    if tensor.ndim != dims or not tensor.numel():
        raise ValueError(f"{what} must be {shape}, at least one of each, not {tuple(tensor.shape)}")
    array: np.ndarray = tensor.detach().double().cpu().numpy()
    if not np.isfinite(array).all():
        place = tuple(int(at) for at in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(
            f"{what} of shape {array.shape} holds {array[place]} at {place}: run the model in fp32 or bf16"
        )
    return array


def picked(what: str, index: int, count: int) -> int:
    """The index from 0, of one that may count from the end.

    Raises:
        ValueError: no such one.
    """
    if not -count <= index < count:
        raise ValueError(f"there is no {what} {index}: there are {count}, give 0 to {count - 1}")
    return index % count
