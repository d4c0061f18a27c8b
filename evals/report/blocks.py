"""The tables and plots of one benchmark: of one run, and of several beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..benchmarks import BENCHMARKS
from ..results import Results
from ..scores import Score
from ..settings import BASELINE
from . import plots
from .export import fact_rows
from .tables import number, p_value, power_lines, shown_p, span, thousands, verdict

_AIMS = {1: "more is better", -1: "less is better", 0: ""}
_PERCENT = "percent"
_ARROWS = {1: " ↑", -1: " ↓", 0: ""}


def block(
    results: Results, benchmark: str, series: Sequence[str] = (), place: int | None = 0
) -> dict[str, Any]:
    """What the page shows for one benchmark of one run.

    Args:
        results: the run.
        benchmark: which.
        series: recipes in the order of their colours.
        place: of the run on the page; None leaves out the plots.
    """
    recipes = results.metrics[benchmark]
    kind = BENCHMARKS[benchmark]
    rows = []
    for score in results.scores(benchmark):
        cells = [cell(metrics["scores"][score.key], score) for metrics in recipes.values()]
        group = "" if score.main else score.key.rpartition(".")[0]
        row = {"title": score.title, "aim": _AIMS[score.better], "cells": cells}
        rows.append({**row, "main": score.main, "group": group})
    first = next(iter(recipes.values()))
    return {
        "key": f"{place}-{benchmark}",
        "name": kind.title,
        "recipes": list(recipes),
        "rows": rows,
        "counts": fact_rows(benchmark, recipes),
        "size": f"{thousands(first['items'])} {kind.units} on {thousands(first['images'])} images",
        "plots": [] if place is None else run_plots(results, benchmark, series, f"{place}-{benchmark}"),
        "legend": legend(series, recipes),
        "reading": kind.reading(results.config["scoring"]),
        "power": power_lines(results, benchmark),
    }


def legend(series: Sequence[str], recipes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Colour and symbol of each recipe."""
    styles = [(recipe, *plots.style(place)) for place, recipe in enumerate(series) if recipe in recipes]
    return [{"recipe": recipe, "colour": colour, "symbol": symbol} for recipe, colour, symbol in styles]


def cell(entry: Mapping[str, Any], score: Score) -> dict[str, Any]:
    """One score of one recipe as text."""
    change = entry.get("difference")
    found: dict[str, Any] = {
        "value": number(entry["value"], score),
        "span": span(entry, score),
        "change": None,
    }
    if change:
        found["change"] = {
            "value": number(change["value"], score, True),
            "span": span(change, score, True),
            "p": p_value(shown_p(change)),
            "verdict": verdict(entry, score),
        }
    return found


def _scale(score: Score) -> float:
    return 100 if score.percent else 1


def _axis(score: Score) -> str:
    aim = _AIMS[score.better]
    return f"{score.title}{', percent' if score.percent else ''}{f' ({aim})' if aim else ''}"


def _unit(score: Score) -> str:
    """Percent, or what a title says after its comma: "length, words"."""
    return _PERCENT if score.percent else score.title.rpartition(", ")[2]


def run_plots(results: Results, benchmark: str, series: Sequence[str], name: str) -> list[dict[str, str]]:
    """The changes against the baseline, and the trade-offs or values, of one run."""
    kind, recipes = BENCHMARKS[benchmark], results.metrics[benchmark]
    scores = {score.key: score for score in results.scores(benchmark)}
    found = []
    if len(recipes) > 1:
        shown = [scores[key] for key in kind.plotted(results.data(benchmark))]
        title = f"Change against {BASELINE}, with 95 % intervals"
        found += _forests(title, shown, recipes, series, name, change=True)
    if kind.tradeoff:
        return found + _tradeoffs({"": results}, benchmark, series, name)
    main = [score for score in scores.values() if score.main]
    return found + _forests("Values, with 95 % intervals", main, recipes, series, name, change=False)


def _forests(
    title: str,
    scores: Sequence[Score],
    recipes: Mapping[str, Any],
    series: Sequence[str],
    name: str,
    change: bool,
) -> list[dict[str, str]]:
    """One plot of the shares, and one for each other unit, such as words."""
    found: list[dict[str, str]] = []
    for unit in dict.fromkeys(map(_unit, scores)):
        rows = []
        for score in scores:
            dots = plots.dots(recipes, score.key, _scale(score), change, series)
            if _unit(score) == unit and dots:
                rows.append((f"{score.title}{_ARROWS[score.better]}", dots))
        if rows:
            kind = "change" if change else "values"
            axis = unit if not change else "percentage points" if unit == _PERCENT else f"change, {unit}"
            own = f"{name}-{kind}-{len(found)}"
            found.append({"title": title, "svg": plots.intervals(title, rows, axis, zero=change, name=own)})
    return found


def _tradeoffs(
    runs: Mapping[str, Results], benchmark: str, series: Sequence[str], name: str
) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for place, keys in enumerate(BENCHMARKS[benchmark].tradeoff):
        groups, across, up = [], None, None
        for label, results in runs.items():
            scores = {score.key: score for score in results.scores(benchmark)}
            across, up = (scores[key] for key in keys)
            recipes = results.metrics[benchmark]
            both = [plots.dots(recipes, score.key, _scale(score), series=series) for score in (across, up)]
            groups.append((label, plots.joined(*both)))
        if across and up and any(points for _, points in groups):
            title = f"{up.title} against {across.title.partition(',')[0]}"
            axes = (_axis(across), _axis(up))
            svg = plots.against(title, groups, axes, name=f"{name}-trade-{place}")
            found.append({"title": title, "svg": svg})
    return found


# ------------------------------------------------------------------------------------------- several runs


def comparison(runs: Mapping[str, Results], series: Sequence[str]) -> list[dict[str, Any]]:
    """What the page shows for each benchmark of several runs: a row for each run and recipe, and plots."""
    benchmarks = dict.fromkeys(name for results in runs.values() for name in results.metrics)
    return [_compared(runs, benchmark, series) for benchmark in benchmarks]


def _compared(runs: Mapping[str, Results], benchmark: str, series: Sequence[str]) -> dict[str, Any]:
    own = {name: results for name, results in runs.items() if benchmark in results.metrics}
    scores = {s.key: s for results in own.values() for s in results.scores(benchmark) if s.main}
    rows = []
    for name, results in own.items():
        for place, (recipe, metrics) in enumerate(results.metrics[benchmark].items()):
            entries = metrics["scores"]
            cells = [cell(entries[key], score) if key in entries else None for key, score in scores.items()]
            rows.append({"run": name, "recipe": recipe, "cells": cells, "first": place == 0})
    hashes = [results.config["data"].get(benchmark, {}) for results in own.values()]
    identities = {(part.get("images_sha256"), part.get("items_sha256")) for part in hashes}
    recipes = {recipe: None for results in own.values() for recipe in results.metrics[benchmark]}
    return {
        "key": f"all-{benchmark}",
        "name": BENCHMARKS[benchmark].title,
        "heads": [(score.title, _AIMS[score.better]) for score in scores.values()],
        "rows": rows,
        "same": len(identities) == 1,
        "plots": _compared_plots(own, benchmark, series),
        "legend": legend(series, recipes),
        "power": [
            f"{name}: {line}" for name, results in own.items() for line in power_lines(results, benchmark)
        ],
    }


def _compared_plots(
    runs: Mapping[str, Results], benchmark: str, series: Sequence[str]
) -> list[dict[str, str]]:
    """One forest plot a score, with a row a run; then the trade-offs."""
    shown: dict[str, Score] = {}
    for results in runs.values():
        scores = {score.key: score for score in results.scores(benchmark)}
        keys = BENCHMARKS[benchmark].plotted(results.data(benchmark))
        shown |= {key: scores[key] for key in keys}
    found = []
    for key, score in shown.items():
        rows = []
        for name, results in runs.items():
            entries = results.metrics[benchmark]
            if all(key in metrics["scores"] for metrics in entries.values()):
                rows.append((name, plots.dots(entries, key, _scale(score), True, series)))
        rows = [row for row in rows if row[1]]
        if rows:
            title = f"{score.title}: change against each run's {BASELINE}"
            unit = "percentage points" if score.percent else f"change of {score.title}"
            axis = f"{unit}{f' ({_AIMS[score.better]})' if score.better else ''}"
            svg = plots.intervals(title, rows, axis, zero=True, name=f"all-{benchmark}-{key}")
            found.append({"title": title, "svg": svg})
    return found + _tradeoffs(runs, benchmark, series, f"all-{benchmark}")
