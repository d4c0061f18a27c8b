"""One look for all pictures: colours, sizes, and axes that lie in a figure of their own or on a given axis."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, RED, PURPLE, BLACK = "#E69F00", "#D55E00", "#CC79A7", "#000000"
"""Okabe and Ito's colours, which people with any kind of colour vision tell apart."""
CATEGORIES = (ORANGE, BLUE, GREEN, RED, SKY, PURPLE, YELLOW, BLACK)
HATCHES = ("//", "..", "\\\\", "xx", "--", "++", "||", "oo")
HEAT = "viridis"
"""Its lightness only grows, so that it is read in print and with any kind of colour vision."""

LOOK: dict[str, Any] = {
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
_LETTER = 0.061
"""Inches that a letter of a title takes in the mean, and a little more."""
P = ParamSpec("P")


def drawn(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """The function in our look. What lies on a given axis keeps the colours of the style that is set."""

    @wraps(function)
    def with_look(*args: P.args, **kwargs: P.kwargs) -> Figure:
        ax = kwargs.get("ax")
        if ax is not None and not isinstance(ax, Axes):
            raise ValueError(f"ax is one matplotlib axis, got {type(ax).__name__}: pass one of its axes")
        with matplotlib.style.context(LOOK, after_reset=ax is None):
            return function(*args, **kwargs)

    return with_look


def numbered(axis: Any, names: Sequence[Any], label: str) -> None:
    """An axis at 0, 1, 2, ... with a name for each place, of which as many are written as fit."""
    axis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 10], min_n_ticks=1))
    axis.set_major_formatter(
        FuncFormatter(lambda at, _: str(names[round(at)]) if 0 <= round(at) < len(names) else "")
    )
    axis.set_label_text(label)


def titled(axes: Axes, text: str) -> None:
    """A title in as many lines as the width of the axis asks for."""
    inches = axes.get_window_extent().width / axes.figure.dpi
    width = max(8, int(inches / _LETTER))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]
    axes.set_title("\n".join(lines))


def cased(width: float, colour: str = "white") -> list[Any]:
    """Path effects that set lines off from whatever is below; those of a collection do not cover each other."""
    return [Stroke(linewidth=width, foreground=colour), Normal()]


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
