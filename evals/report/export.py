"""The tables of runs as CSV, in full precision, and as Markdown, rounded."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any, NamedTuple

from ..benchmarks import BENCHMARKS
from ..cost import cost_cells, speed
from ..results import Results
from ..scores import Score
from .tables import number, p_value, shown_p, span, verdict

HEADS = (
    "run",
    "benchmark",
    "recipe",
    "score",
    "title",
    "unit",
    "value",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "p_holm",
    "images_for_1_point",
    "detectable",
    "items",
    "images",
)
_FACTS = ("unclear", "cut", "tokens", "seconds", "median_seconds", "peak_memory")


class Export(NamedTuple):
    """One table as files.

    Attributes:
        name: of the files, without their ending.
        csv, markdown: their text.
    """

    name: str
    csv: str
    markdown: str


def export(runs: Mapping[str, Results], benchmark: str) -> Export:
    """Every score and fact of a benchmark in these runs, by the names under which they are shown."""
    found = {name: results for name, results in runs.items() if benchmark in results.metrics}
    return Export(benchmark, _csv(found, benchmark), _markdown(found, benchmark))


def write_tables(results: Results, exports: Sequence[Export]) -> None:
    """Write `tables/<benchmark>.csv` and `.md` into the folder of a run."""
    for table in exports:
        results.folder.write_text(f"tables/{table.name}.csv", table.csv)
        results.folder.write_text(f"tables/{table.name}.md", table.markdown)


def _csv(runs: Mapping[str, Results], benchmark: str) -> str:
    """One row for each run, recipe and score; the facts beside the scores have a value alone."""
    stream = StringIO()
    writer = csv.DictWriter(stream, HEADS, restval="", lineterminator="\n")
    writer.writeheader()
    for name, results in runs.items():
        for recipe, metrics in results.metrics[benchmark].items():
            common = {"run": name, "benchmark": benchmark, "recipe": recipe}
            common |= {"items": metrics["items"], "images": metrics["images"]}
            for score in results.scores(benchmark):
                writer.writerow({**common, **_numbers(score, metrics["scores"][score.key])})
            writer.writerows({**common, **row} for row in _facts(metrics))
    return stream.getvalue()


def _numbers(score: Score, entry: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "score": score.key,
        "title": score.title,
        "unit": "share of 1" if score.percent else "as titled",
    }
    row |= {part: entry[part] for part in ("value", "low", "high")}
    change = entry.get("difference")
    if change:
        row |= {"difference": change["value"], "p": change["p"], "p_holm": change.get("p_holm")}
        row |= {f"difference_{end}": change[end] for end in ("low", "high")}
        power = change.get("power") or {}
        row |= {"images_for_1_point": power.get("images"), "detectable": power.get("detectable")}
    return {key: "" if value is None else value for key, value in row.items()}


def _facts(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [{"score": name, "value": metrics[name]} for name in _FACTS if metrics.get(name) is not None]
    if rate := speed(metrics):
        rows.append({"score": "tokens_per_second", "value": rate})
    if test := metrics.get("mcnemar"):
        rows += [{"score": f"mcnemar_{way}", "value": test[way]} for way in ("gained", "lost")]
        p_holm = test.get("p_holm")
        rows.append({"score": "mcnemar", "p": test["p"], "p_holm": "" if p_holm is None else p_holm})
    return rows


def _markdown(runs: Mapping[str, Results], benchmark: str) -> str:
    """Rows are scores, or runs and recipes where there are several runs."""
    if len(runs) == 1:
        ((_, results),) = runs.items()
        recipes = results.metrics[benchmark]
        rows = [
            [score.title, *(cell_text(m["scores"][score.key], score) for m in recipes.values())]
            for score in results.scores(benchmark)
        ]
        rows += [[title, *cells] for title, cells in fact_rows(benchmark, recipes)]
        return markdown_table([BENCHMARKS[benchmark].title, *recipes], rows)
    scores = {score.key: score for results in runs.values() for score in results.scores(benchmark)}
    rows = []
    for name, results in runs.items():
        own = {score.key for score in results.scores(benchmark)}
        for recipe, metrics in results.metrics[benchmark].items():
            entries = metrics["scores"]
            cells = [cell_text(entries[key], score) if key in own else "" for key, score in scores.items()]
            rows.append([name, recipe, *cells])
    return markdown_table(["run", "recipe", *(score.title for score in scores.values())], rows)


def cell_text(entry: Mapping[str, Any], score: Score) -> str:
    """Value, interval and change in one line."""
    text = f"{number(entry['value'], score)} ({span(entry, score)})"
    change = entry.get("difference")
    if change:
        judged = verdict(entry, score)
        text += f"; {number(change['value'], score, True)} ({span(change, score, True)}), p {p_value(shown_p(change))}"
        text += f", {judged}" if judged else ""
    return text


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(_escaped(cell) for cell in line) + " |\n" for line in lines)


def _escaped(cell: str) -> str:
    text = cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<")
    return " ".join(text.split()) if "\n" in text else text


def csv_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of texts as CSV."""
    stream = StringIO()
    csv.writer(stream, lineterminator="\n").writerows([heads, *rows])
    return stream.getvalue()


def fact_rows(benchmark: str, recipes: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Facts beside the scores, one row each: (title, one cell per recipe)."""
    found = list(recipes.values())
    rows = []
    if "unclear" in found[0]:
        rows.append(("unclear answers", [f"{m['unclear']} of {m['items']}" for m in found]))
    good, bad = BENCHMARKS[benchmark].became
    if len(found) > 1:
        tests = [m.get("mcnemar") for m in found]
        rows.append((good, ["" if t is None else str(t["gained"]) for t in tests]))
        rows.append((bad, ["" if t is None else str(t["lost"]) for t in tests]))
        rows.append(("McNemar, exact p", ["" if t is None else p_value(shown_p(t)) for t in tests]))
    if found[0]["tokens"] is None:  # answers made elsewhere
        return rows
    rows.append(("cut by the token limit", [str(m["cut"]) for m in found]))
    costs = [cost_cells(m, found[0]) for m in found]
    rows += [(title, [cells[title] for cells in costs]) for title in costs[0]]
    rows.append(("median time of one", [f"{m['median_seconds'] * 1000:.0f} ms" for m in found]))
    return rows
