"""Tables of results for a terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..benchmarks import BENCHMARKS
from ..cost import cost_cells
from ..scores import Score

if TYPE_CHECKING:
    from ..results import Results

_CHANCE = 0.05
READING = (
    "↑ more is better, ↓ less is better. Intervals: 95 %, images drawn with replacement. p: paired test that swaps "
    "whole images, {holm}."
)
HOLM = {
    True: "corrected by Holm's method for the number of recipes beside each score",
    False: "not corrected for the number of comparisons",
}


def corrected(metrics: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the p-values of {benchmark: {recipe: ...}} are corrected by Holm's method."""
    changes = (entry.get("difference") for entries in _scores(metrics) for entry in entries.values())
    return any("p_holm" in change for change in changes if change)


def _scores(metrics: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [found["scores"] for recipes in metrics.values() for found in recipes.values()]


def shown_p(test: Mapping[str, Any]) -> float | None:
    """The p-value that is shown and judged: Holm's where there is one."""
    p: float | None = test["p"] if test.get("p_holm") is None else test["p_holm"]
    return p


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
    if not difference or not score.better or not sure(difference):
        return ""
    return "better" if difference["value"] * score.better > 0 else "worse"


def sure(difference: Mapping[str, Any]) -> bool:
    """Whether interval and test both tell a difference from chance."""
    p = shown_p(difference)
    if p is None or p >= _CHANCE or difference["low"] is None:
        return False
    return not difference["low"] <= 0 <= difference["high"]


def power_line(benchmark: str, recipes: Mapping[str, Any], score: Score) -> str:
    """How many images a change of one point in a score would need, for each recipe; "" where it is not known."""
    found = {
        recipe: (metrics["scores"][score.key].get("difference") or {}).get("power")
        for recipe, metrics in recipes.items()
    }
    known = {recipe: power for recipe, power in found.items() if power}
    if not known:
        return ""
    needed = " or ".join(f"{thousands(power['images'])} ({recipe})" for recipe, power in known.items())
    images = thousands(next(iter(recipes.values()))["images"])
    seen = [
        f"{power['detectable'] * 100:.1f} ({recipe})"
        for recipe, power in known.items()
        if power["detectable"] is not None
    ]
    least = f", enough for a change of {' or '.join(seen)} points" if seen else ""
    return (
        f"To see a change of 1 point in {named(benchmark, score)} with 80 % power, about {needed} images would be "
        f"needed (this run: {images}{least})."
    )


def power_lines(results: "Results", benchmark: str) -> list[str]:
    """`power_line` of the benchmark's first scores."""
    scores = {score.key: score for score in results.scores(benchmark)}
    shown = [scores[key] for key in BENCHMARKS[benchmark].headline]
    lines = [power_line(benchmark, results.metrics[benchmark], score) for score in shown]
    return [line for line in lines if line]


def joint(results: "Results") -> list[str]:
    """Sentences on figures that take in several benchmarks of the run."""
    lines = [BENCHMARKS[benchmark].together(results.metrics) for benchmark in results.metrics]
    return [line for line in lines if line]


def named(benchmark: str, score: Score) -> str:
    """A score with its benchmark's name, where it does not begin with that."""
    title = BENCHMARKS[benchmark].title
    return score.title if score.title.startswith(title) else f"{title} {score.title}"


def thousands(count: int) -> str:
    """A count with narrow spaces."""
    return f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def listing(parts: Sequence[str]) -> str:
    """One, two and three."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def facts(metrics: Mapping[str, Any], benchmark: str) -> str:
    """Counts beside the scores of one recipe."""
    parts, kind = [], BENCHMARKS[benchmark]
    if "unclear" in metrics:
        parts.append(f"{metrics['unclear']} of {metrics['items']} answers unclear")
    if "mcnemar" in metrics:
        test = metrics["mcnemar"]
        parts.append(
            f"{test['gained']} {kind.units} {kind.became[0]}, {test['lost']} {kind.became[1]} "
            f"(McNemar p {p_value(shown_p(test))})"
        )
    if metrics["tokens"] is not None:
        parts.append(f"{metrics['cut']} cut by the token limit")
        parts.append(f"{metrics['median_seconds'] * 1000:.0f} ms each")
    return "; ".join(parts)


def tables(results: "Results", full: bool = False) -> list[Any]:
    """One table per benchmark, with the facts of each recipe below it."""
    from ..results import MINIATURE_NOTE

    parts: list[Any] = []
    for benchmark, recipes in results.metrics.items():
        first = next(iter(recipes.values()))
        kind = BENCHMARKS[benchmark]
        title = f"{kind.title}: {first['items']} {kind.units}, {first['images']} images"
        parts.append(_table(title, recipes, [s for s in results.scores(benchmark) if full or s.main]))
        if first["tokens"] is not None:
            parts.append(_costs(recipes))
        told = {recipe: facts(found, benchmark) for recipe, found in recipes.items()}
        parts += [Text(f"  {recipe}: {text}") for recipe, text in told.items() if text]
        parts += [Text(f"  {line}", style="dim") for line in power_lines(results, benchmark)]
        parts.append(Text(""))
    parts += [Text(line) for line in joint(results)]
    for part, (done, total) in results.unfinished.items():
        parts.append(Text(f"not finished: {part}, {done} of {total} items", style="yellow"))
    parts.append(Text(READING.format(holm=HOLM[corrected(results.metrics)]), style="dim"))
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
                    p_value(shown_p(change)),
                ]
            style = {"better": "green", "worse": "red"}.get(verdict(entry, score), "")
            table.add_row(f"  {recipe}", *cells, style=style)
    return table
