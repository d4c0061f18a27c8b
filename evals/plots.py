"""Plots for the results page, as SVG text whose colours are the page's own (light and dark)."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any, NamedTuple

# Colours that stand for the page's variables: matplotlib writes them, `_svg` puts the variable there.
_INK, _FAINT = "#101010", "#202020"
_SERIES = [f"#30{place:02x}30" for place in range(8)]
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--line)", **{c: f"var(--r{i})" for i, c in enumerate(_SERIES)}}
_MARKERS = "osD^vPXh"
SYMBOLS = "●■◆▲▼✚✖⬢"
WIDTH = 4.3  # inches of 72 points: the labels stay legible when a phone shows the plot 350 pixels wide


class Dot(NamedTuple):
    """A value with its interval; `series` is the place of its recipe, 0 for the baseline."""

    series: int
    value: float
    low: float
    high: float


def style(series: int) -> tuple[int, str]:
    """(number of the page's colour, symbol) of a recipe."""
    return series % len(_SERIES), SYMBOLS[series % len(SYMBOLS)]


def intervals(
    title: str, rows: Sequence[tuple[str, Sequence[Dot]]], axis: str, zero: bool = False, name: str = ""
) -> str:
    """Rows of dots with their intervals.

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
    most = max(len(dots) for _, dots in rows)
    figure, axes = _figure(0.9 + len(rows) * (0.22 + 0.16 * most))
    for place, (_, dots) in enumerate(rows):
        for order, dot in enumerate(dots):
            height = place + (order - (len(dots) - 1) / 2) * 0.62 / most
            colour = _SERIES[dot.series % len(_SERIES)]
            axes.plot(
                [dot.low, dot.high], [height, height], color=colour, linewidth=1.6, solid_capstyle="butt"
            )
            marker = _MARKERS[dot.series % len(_MARKERS)]
            axes.plot([dot.value], [height], marker=marker, color=colour, markersize=5.5, linestyle="")
    if zero:
        axes.axvline(0, color=_INK, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    for edge in range(1, len(rows)):
        axes.axhline(edge - 0.5, color=_FAINT, linewidth=0.6, zorder=0)
    axes.set_xlabel(axis)
    axes.tick_params(axis="y", length=0)
    return _svg(figure, title)


def against(title: str, dots: Sequence[tuple[Dot, Dot]], axes_names: tuple[str, str], name: str = "") -> str:
    """One point per recipe in the plane of two scores, with both intervals: (across, up)."""
    from matplotlib import rc_context

    with rc_context(_options(name)):
        return _against(title, dots, axes_names)


def _against(title: str, dots: Sequence[tuple[Dot, Dot]], axes_names: tuple[str, str]) -> str:
    figure, axes = _figure(3.1)
    for across, up in dots:
        colour = _SERIES[up.series % len(_SERIES)]
        axes.plot([across.low, across.high], [up.value] * 2, color=colour, linewidth=1.2)
        axes.plot([across.value] * 2, [up.low, up.high], color=colour, linewidth=1.2)
        marker = _MARKERS[up.series % len(_MARKERS)]
        axes.plot([across.value], [up.value], marker=marker, color=colour, markersize=7, linestyle="")
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.grid(color=_FAINT, linewidth=0.6)
    return _svg(figure, title)


def dots(recipes: Mapping[str, Any], key: str, scale: float = 100, change: bool = False) -> list[Dot]:
    """The dots of one score over recipes; recipes without it are left out."""
    found = []
    for series, metrics in enumerate(recipes.values()):
        entry = metrics["scores"][key]
        entry = entry.get("difference") if change else entry
        if entry and None not in (entry["value"], entry["low"]):
            found.append(Dot(series, *(entry[part] * scale for part in ("value", "low", "high"))))
    return found


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
