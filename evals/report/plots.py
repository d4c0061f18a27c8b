"""Plots for the results page, as SVG text whose colours are the page's own (light, dark and printed)."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from itertools import pairwise
from typing import Any, NamedTuple

from .tables import sure

# Colours that stand for the page's variables: matplotlib writes them, `_svg` puts the variable there.
_INK, _FAINT, _PAPER = "#101010", "#202020", "#404040"
_SERIES = [f"#30{place:02x}30" for place in range(8)]
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--line)",
    _PAPER: "var(--card)",
    **{colour: f"var(--r{place})" for place, colour in enumerate(_SERIES)},
}
_MARKERS = "osD^vPXh"
SYMBOLS = "●■◆▲▼✚✖⬢"
WIDTH = 4.3  # inches of 72 points: the labels stay legible when a phone shows the plot 350 pixels wide
_LABEL = 26  # characters


class Dot(NamedTuple):
    """A value with its interval.

    Attributes:
        series: place of its recipe, 0 for the baseline.
        value, low, high: as shown.
        sure: drawn full; hollow is within chance.
    """

    series: int
    value: float
    low: float
    high: float
    sure: bool = True


Pair = tuple[Dot, Dot]
"""One recipe in the plane of two scores: (across, up)."""


def style(series: int) -> tuple[int, str]:
    """(number of the page's colour, symbol) of a recipe; no two of the first 64 have the same."""
    colour, marker = _style(series)
    return colour, SYMBOLS[marker]


def _style(series: int) -> tuple[int, int]:
    return series % 8, (series + series // 8) % 8


def intervals(
    title: str, rows: Sequence[tuple[str, Sequence[Dot]]], axis: str, zero: bool = False, name: str = ""
) -> str:
    """Rows of dots with their intervals: a forest plot, where `zero` is set.

    Args:
        title: above the plot.
        rows: (label, the dots of that row), from top to bottom.
        axis: label of the horizontal axis.
        zero: draw a line at nought (for differences).
        name: of the plot, unique on the page.
    """
    from matplotlib import rc_context

    with rc_context(_options(name)):
        return _intervals(title, rows, axis, zero)


def _intervals(title: str, rows: Sequence[tuple[str, Sequence[Dot]]], axis: str, zero: bool) -> str:
    lines = [max(len(dots), 1) for _, dots in rows]
    figure, axes = _figure(0.9 + sum(0.22 + 0.16 * count for count in lines))
    heights = [0.0]
    for count in lines:
        heights.append(heights[-1] + 0.22 + 0.16 * count)
    for (_, dots), top in zip(rows, heights, strict=False):
        for order, dot in enumerate(dots):
            _draw(axes, dot, top + 0.11 + 0.16 * (order + 0.5))
    if zero:
        axes.axvline(0, color=_INK, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    middles = [(top + below) / 2 for top, below in pairwise(heights)]
    axes.set_yticks(middles, [_short(label) for label, _ in rows])
    axes.set_ylim(heights[-1], 0)
    for edge in heights[1:-1]:
        axes.axhline(edge, color=_FAINT, linewidth=0.6, zorder=0)
    axes.set_xlabel(axis)
    axes.tick_params(axis="y", length=0)
    return _svg(figure, title)


def _draw(axes: Any, dot: Dot, height: float) -> None:
    colour, marker = _style(dot.series)
    ink = _SERIES[colour]
    axes.plot([dot.low, dot.high], [height, height], color=ink, linewidth=1.6, solid_capstyle="butt")
    _mark(axes, dot.value, height, ink, marker, 5.5, dot.sure)


def _mark(axes: Any, x: float, y: float, ink: str, marker: int, size: float, full: bool) -> None:
    axes.plot(
        [x],
        [y],
        marker=_MARKERS[marker],
        color=ink,
        markerfacecolor=ink if full else _PAPER,
        markersize=size,
        linestyle="",
    )


def against(
    title: str, groups: Sequence[tuple[str, Sequence[Pair]]], axes_names: tuple[str, str], name: str = ""
) -> str:
    """One point per recipe in the plane of two scores, with both intervals.

    Args:
        title: above the plot.
        groups: (label, points) of each run; a thin line joins its baseline, the point of series 0, to the others.
        axes_names: labels of the axes: (across, up).
        name: of the plot, unique on the page.
    """
    from matplotlib import rc_context

    with rc_context(_options(name)):
        return _against(title, groups, axes_names)


def _against(title: str, groups: Sequence[tuple[str, Sequence[Pair]]], axes_names: tuple[str, str]) -> str:
    figure, axes = _figure(3.3)
    for label, points in groups:
        start = next((pair for pair in points if pair[0].series == 0), None)
        for across, up in points:
            colour, marker = _style(up.series)
            ink = _SERIES[colour]
            axes.plot([across.low, across.high], [up.value] * 2, color=ink, linewidth=1.2)
            axes.plot([across.value] * 2, [up.low, up.high], color=ink, linewidth=1.2)
            if start:
                line = [start[0].value, across.value], [start[1].value, up.value]
                axes.plot(*line, color=_INK, linewidth=0.5, linestyle=(0, (1, 2)), zorder=0)
            _mark(axes, across.value, up.value, ink, marker, 7, True)
        if label and start:
            place = (start[0].value, start[1].value)
            text = {"textcoords": "offset points", "fontsize": 8.5, "color": _INK}
            axes.annotate(_short(label), place, xytext=(5, 5), **text)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.grid(color=_FAINT, linewidth=0.6)
    return _svg(figure, title)


def dots(
    recipes: Mapping[str, Any],
    key: str,
    scale: float = 100,
    change: bool = False,
    series: Sequence[str] | None = None,
) -> list[Dot]:
    """The dots of one score over recipes; recipes without it are left out.

    Args:
        recipes: {recipe: metrics}.
        key: of the score.
        scale: what values are multiplied by.
        change: the difference to the baseline in place of the value.
        series: all recipes in the order of their colours; default is those of `recipes`.
    """
    order = list(series or recipes)
    found = []
    for recipe, metrics in recipes.items():
        entry = metrics["scores"][key]
        entry = entry.get("difference") if change else entry
        if entry and None not in (entry["value"], entry["low"]):
            value, low, high = (entry[part] * scale for part in ("value", "low", "high"))
            found.append(Dot(order.index(recipe), value, low, high, not change or sure(entry)))
    return found


def joined(across: Sequence[Dot], up: Sequence[Dot]) -> list[Pair]:
    """The recipes that have both scores."""
    other = {dot.series: dot for dot in up}
    return [(dot, other[dot.series]) for dot in across if dot.series in other]


def _short(label: str) -> str:
    return label if len(label) <= _LABEL else label[: _LABEL - 1] + "…"


def _options(name: str) -> Any:
    # The salt makes the ids that are referred to unique on the page, and the same from run to run.
    return {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5, "font.family": "sans-serif"}


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    stream = StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)[ >].*?</\1>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)  # the page's own
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every plot, and nothing refers to them
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"', rf'\1role="img" aria-label="{escape(title)}"', text, count=1)
    return re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", text, count=1)
