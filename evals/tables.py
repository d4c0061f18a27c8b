"""Tables of results for a terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from .benchmarks import BENCHMARKS
from .cost import cost_cells
from .scores import Score

if TYPE_CHECKING:
    from .results import Results

_CHANCE = 0.05
READING = (
    "↑ more is better, ↓ less is better. Intervals: 95 %, images drawn with replacement. p: paired test that swaps "
    "whole images, not corrected for the number of comparisons."
)


def number(value: float | None, score: Score, sign: bool = False) -> str:
    """A score as it is shown: shares in percent with one decimal, a dash when it is not defined."""
    if value is None:
        return "–"
    shown = value * 100 if score.percent else value
    text = f"{shown:+.1f}" if sign else f"{shown:.1f}"
    return text.replace("-", "−") if text not in ("+0.0", "-0.0") else "0.0"


def span(entry: Mapping[str, Any], score: Score, sign: bool = False) -> str:
    """An interval as it is shown."""
    if entry["low"] is None:
        return "–"
    return f"{number(entry['low'], score, sign)} to {number(entry['high'], score, sign)}"


def p_value(p: float | None) -> str:
    """A p-value as it is shown."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def verdict(entry: Mapping[str, Any], score: Score) -> str:
    """ "better" or "worse" where interval and test agree on it at 95 %, else ""; "" for a score without direction.

    With few images that change, the bootstrap interval alone claims too much.
    """
    difference = entry.get("difference")
    if not difference or difference["p"] is None or not score.better:
        return ""
    if difference["low"] <= 0 <= difference["high"] or difference["p"] >= _CHANCE:
        return ""
    return "better" if difference["value"] * score.better > 0 else "worse"


def facts(metrics: Mapping[str, Any], benchmark: str) -> str:
    """Counts beside the scores of one recipe."""
    parts, kind = [], BENCHMARKS[benchmark]
    if "unclear" in metrics:
        parts.append(f"{metrics['unclear']} of {metrics['items']} answers unclear")
    if "mcnemar" in metrics:
        test = metrics["mcnemar"]
        parts.append(
            f"{test['gained']} {kind.units} {kind.became[0]}, {test['lost']} {kind.became[1]} "
            f"(McNemar p {p_value(test['p'])})"
        )
    parts.append(f"{metrics['cut']} cut by the token limit")
    parts.append(f"{metrics['median_seconds'] * 1000:.0f} ms each")
    return "; ".join(parts)


def tables(results: "Results", full: bool = False) -> list[Any]:
    """One table per benchmark, with the facts of each recipe below it."""
    from .results import MINIATURE_NOTE

    parts: list[Any] = []
    for benchmark, recipes in results.metrics.items():
        first = next(iter(recipes.values()))
        kind = BENCHMARKS[benchmark]
        title = f"{kind.title}: {first['items']} {kind.units}, {first['images']} images"
        parts.append(_table(title, recipes, [s for s in results.scores(benchmark) if full or s.main]))
        parts.append(_costs(recipes))
        parts += [Text(f"  {recipe}: {facts(found, benchmark)}") for recipe, found in recipes.items()]
        parts.append(Text(""))
    for part, (done, total) in results.unfinished.items():
        parts.append(Text(f"not finished: {part}, {done} of {total} items", style="yellow"))
    parts.append(Text(READING, style="dim"))
    if results.miniature:
        parts.append(Text(MINIATURE_NOTE, style="dim"))
    return parts


def _costs(recipes: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    baseline = next(iter(recipes.values()))
    table.add_column("cost, beside the baseline's", overflow="fold")
    for name in cost_cells(baseline, baseline):
        table.add_column(name, justify="right", no_wrap=True)
    for recipe, found in recipes.items():
        table.add_row(f"  {recipe}", *cost_cells(found, baseline).values())
    return table


def _table(title: str, recipes: Mapping[str, Any], scores: list[Score]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("score, recipe", overflow="fold")
    for name in ("value", "95 % interval", "change", "95 % interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in scores:
        aim = {1: " ↑", -1: " ↓", 0: ""}[score.better]
        table.add_row(Text(score.title + aim, style="bold"))
        for recipe, found in recipes.items():
            entry = found["scores"][score.key]
            change = entry.get("difference")
            cells = [number(entry["value"], score), span(entry, score)]
            if change:
                cells += [
                    number(change["value"], score, True),
                    span(change, score, True),
                    p_value(change["p"]),
                ]
            style = {"better": "green", "worse": "red"}.get(verdict(entry, score), "")
            table.add_row(f"  {recipe}", *cells, style=style)
    return table
