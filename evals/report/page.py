"""The results page: one HTML file with its style, script, plots, items and images inside; of one run or of many.

The page asks nothing of the network, and its content security policy makes sure of it. Tables and plots need no
script; the browser of the items and the buttons that save tables do.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..benchmarks import BENCHMARKS
from ..results import MINIATURE_NOTE, Results
from ..scores import Score
from ..settings import BASELINE
from .blocks import block, comparison
from .export import Export, csv_table, export, markdown_table, write_tables
from .file import policy, script_text, template, write_page
from .items import PageItems
from .pictures import keep_pictures
from .setup import engine_reports, runs_table, setup
from .tables import HOLM, corrected, joint, listing, named, number, thousands, verdict


def write_report(
    results: Results | Sequence[Results],
    files: Mapping[str, Path] | None = None,
    out: str | Path | None = None,
) -> Path:
    """Write the page of one run, or one page for several.

    Without `out`, the page of a run is `report.html` in its folder, and small copies of its images and its tables
    (`tables/<benchmark>.csv` and `.md`) are kept there. With `out`, no run's folder is touched.

    Args:
        results: one run, or several to compare, each against its own baseline.
        files: image files by name, of which small copies are kept in the run; without them the page shows the
            copies that are there. Only for one run.
        out: file of the page; several runs need it.

    Returns:
        The page.

    Raises:
        ValueError: several runs without `out`, with `files`, or the same run twice; or no run.
        RunFolderError: `out` cannot be written.
    """
    several = [results] if isinstance(results, Results) else list(results)
    if not several:
        raise ValueError("no run to report")
    if len(several) > 1 and (out is None or files):
        raise ValueError(f"{len(several)} runs on one page: give out= and leave files= away")
    runs = _named_runs(several)
    first = several[0]
    if out is None:
        keep_pictures(first.path, _images(first), files or {})
    exports = {
        f"0-{name}" if len(runs) == 1 else f"all-{name}": export(runs, name)
        for name in dict.fromkeys(name for found in several for name in found.metrics)
    }
    text = _page(runs, exports)
    if out is None:
        write_tables(first, list(exports.values()))
        first.folder.write_text("report.html", text)
        return first.page
    return write_page(Path(out), text)


def html_tables(results: Results) -> str:
    """The tables alone, for a notebook."""
    blocks = [block(results, benchmark, place=None) for benchmark in results.metrics]
    return template("tables.html.j2").render(
        blocks=blocks, note=MINIATURE_NOTE if results.miniature else None
    )


def headline(results: Results) -> list[str]:
    """Sentences on what was run and what came of it, without judging beyond the intervals."""
    done = []
    for benchmark, recipes in results.metrics.items():
        first = recipes[BASELINE]
        kind = BENCHMARKS[benchmark]
        done.append(
            f"{thousands(first['items'])} {kind.title} {kind.units} on {thousands(first['images'])} images"
        )
    others = [recipe for recipe in results.config["recipes"] if recipe != BASELINE]
    compared = f", without and with {listing(others)}" if others else ", without any recipe"
    text = " and ".join(done)
    sentences = [f"{text[0].upper()}{text[1:]}{compared}."]
    for benchmark, recipes in results.metrics.items():
        if len(recipes) > 1:
            scores = {score.key: score for score in results.scores(benchmark)}
            for key in BENCHMARKS[benchmark].headline:
                sentences.append(_change_sentence(benchmark, scores[key], recipes))
    return [*sentences, *joint(results)]


def _change_sentence(benchmark: str, score: Score, recipes: Mapping[str, Any]) -> str:
    start = number(recipes[BASELINE]["scores"][score.key]["value"], score)
    parts = []
    for recipe, metrics in recipes.items():
        if recipe == BASELINE:
            continue
        entry = metrics["scores"][score.key]
        change = entry["difference"]
        sure = verdict(entry, score) or "within chance"
        parts.append(
            f"{number(entry['value'], score)} with {recipe} ({number(change['value'], score, True)}, {sure})"
        )
    aim = ", where less is better" if score.better < 0 else ""
    return f"{named(benchmark, score)} is {start} without{aim}; {listing(parts)}."


def _named_runs(several: Sequence[Results]) -> dict[str, Results]:
    """The runs by the shortest ends of their paths that tell them apart."""
    paths = [results.path.resolve() for results in several]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice: name each run once")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, several, strict=True))


def _images(results: Results) -> list[str]:
    kinds = [(BENCHMARKS[name], results.data(name)) for name in results.metrics]
    return list(dict.fromkeys(item.image for kind, data in kinds for item in kind.items(data)))


def _page(runs: Mapping[str, Results], exports: dict[str, Export]) -> str:
    series = list(dict.fromkeys(r for results in runs.values() for r in results.config["recipes"]))
    several = len(runs) > 1
    table = runs_table(runs) if several else None
    if table:
        exports["runs"] = Export("runs", csv_table(*table), markdown_table(*table))
    items = PageItems(runs, series)
    here = Path(__file__).resolve().parent
    scripts = [(here / name).read_text(encoding="utf-8").strip() for name in ("page.js", "browser.js")]
    texts = {key: found._asdict() for key, found in exports.items()}
    blocks = [("exports", script_text(json.dumps(texts, ensure_ascii=False))), *items.scripts()]
    metrics = [results.metrics for results in runs.values()]
    text: str = template("report.html.j2").render(
        title=_title(runs),
        headline=[] if several else headline(*runs.values()),
        note=MINIATURE_NOTE if any(results.miniature for results in runs.values()) else None,
        runs=[_run(name, results, series, place) for place, (name, results) in enumerate(runs.items())],
        runs_table=table,
        comparison=comparison(runs, series) if several else [],
        series=series,
        holm=HOLM[all(map(corrected, metrics))],
        items=items,
        policy=policy(scripts),
        scripts=scripts,
        data=blocks,
    )
    return text


def _run(name: str, results: Results, series: Sequence[str], place: int) -> dict[str, Any]:
    return {
        "name": name,
        "headline": headline(results),
        "unfinished": results.unfinished,
        "blocks": [block(results, benchmark, series, place) for benchmark in results.metrics],
        "setup": setup(results),
        "engine": engine_reports(results),
        "resumed": len(results.config["sessions"]) > 1,
    }


def _title(runs: Mapping[str, Results]) -> str:
    titles = dict.fromkeys(BENCHMARKS[b].title for results in runs.values() for b in results.metrics)
    models = dict.fromkeys(results.config["model_name"] for results in runs.values())
    where = next(iter(models)) if len(models) == 1 else f"{len(models)} models"
    return f"{' and '.join(titles)} on {where}{f', {len(runs)} runs' if len(runs) > 1 else ''}"
