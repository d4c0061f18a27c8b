"""The results page: one HTML file with its style, plots and images inside."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from . import plots
from .benchmarks import BENCHMARKS
from .cost import cost_cells
from .results import MINIATURE_NOTE, Results
from .run_folder import Record, slug
from .scores import Score
from .settings import BASELINE
from .tables import number, p_value, span, verdict

EXAMPLES = 5
DISAGREEMENTS = 8
_THUMBNAIL = 360  # pixels of the longer side


def write_report(results: Results, files: Mapping[str, Path] | None = None) -> Path:
    """Write `report.html` into the run's folder.

    Args:
        results: what to show.
        files: image files by name; those that the page shows are copied, small, into the run.
    """
    captions = caption_examples(results) if "chair" in results.metrics else None
    answers = pope_disagreements(results) if "pope" in results.metrics else None
    shown = [row["image"] for part in (captions, answers) if part for row in part["rows"]]
    _keep_thumbnails(results.path, dict.fromkeys(shown), files or {})
    text = _template("report.html.j2").render(
        title=_title(results),
        headline=headline(results),
        note=MINIATURE_NOTE if results.miniature else None,
        unfinished=results.unfinished,
        legend=_legend(results),
        blocks=[_block(results, benchmark) for benchmark in results.metrics],
        captions=captions,
        answers=answers,
        picture=lambda name: _data_uri(results.path / "data" / "images" / Path(name).name),
        setup=_setup(results),
        engine=_engine_reports(results),
        resumed=len(results.config["sessions"]) > 1,
    )
    results.folder.write_text("report.html", text)
    return results.page


def html_tables(results: Results) -> str:
    """The tables alone, for a notebook."""
    blocks = [_block(results, benchmark, plotted=False) for benchmark in results.metrics]
    return _template("tables.html.j2").render(
        blocks=blocks, note=MINIATURE_NOTE if results.miniature else None
    )


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).resolve().parent)
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _template(name: str) -> Any:
    return _environment().get_template(name)


def _title(results: Results) -> str:
    names = " and ".join(BENCHMARKS[benchmark].title for benchmark in results.metrics)
    return f"{names} on {results.config['model_name']}"


def _thousands(count: int) -> str:
    return f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _others(results: Results) -> list[str]:
    return [recipe for recipe in results.config["recipes"] if recipe != BASELINE]


def headline(results: Results) -> list[str]:
    """Sentences on what was run and what came of it, without judging beyond the intervals."""
    done = []
    for benchmark, recipes in results.metrics.items():
        first = recipes[BASELINE]
        kind = BENCHMARKS[benchmark]
        done.append(
            f"{_thousands(first['items'])} {kind.title} {kind.units} on {_thousands(first['images'])} images"
        )
    others = _others(results)
    compared = f", without and with {_listing(others)}" if others else ", without any recipe"
    text = " and ".join(done)
    sentences = [f"{text[0].upper()}{text[1:]}{compared}."]
    for benchmark, recipes in results.metrics.items():
        if len(recipes) > 1:
            scores = {score.key: score for score in results.scores(benchmark)}
            for key in BENCHMARKS[benchmark].headline:
                sentences.append(_change_sentence(benchmark, scores[key], recipes))
    return sentences


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
    kind = BENCHMARKS[benchmark]
    where = "" if score.title.startswith(kind.title) else f"{kind.title} "
    aim = ", where less is better" if score.better < 0 else ""
    return f"{where}{score.title} is {start} without{aim}; {_listing(parts)}."


def _listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _legend(results: Results) -> list[dict[str, Any]]:
    return [
        {"recipe": recipe, "colour": plots.style(place)[0], "symbol": plots.style(place)[1]}
        for place, recipe in enumerate(results.config["recipes"])
    ]


def _block(results: Results, benchmark: str, plotted: bool = True) -> dict[str, Any]:
    """What the page shows for one benchmark."""
    recipes = results.metrics[benchmark]
    rows = []
    for score in results.scores(benchmark):
        cells = [_cell(metrics["scores"][score.key], score) for metrics in recipes.values()]
        aim = {1: "more is better", -1: "less is better", 0: ""}[score.better]
        group = "" if score.main else score.key.rpartition(".")[0]
        rows.append({"title": score.title, "aim": aim, "cells": cells, "main": score.main, "group": group})
    first = recipes[BASELINE]
    return {
        "name": BENCHMARKS[benchmark].title,
        "recipes": list(recipes),
        "rows": rows,
        "counts": _count_rows(benchmark, recipes),
        "size": f"{_thousands(first['items'])} {BENCHMARKS[benchmark].units} on {_thousands(first['images'])} images",
        "plots": _plots(results, benchmark) if plotted else [],
        "reading": BENCHMARKS[benchmark].reading(results.config["scoring"]),
    }


def _cell(entry: Mapping[str, Any], score: Score) -> dict[str, Any]:
    change = entry.get("difference")
    cell: dict[str, Any] = {
        "value": number(entry["value"], score),
        "span": span(entry, score),
        "change": None,
    }
    if change:
        cell["change"] = {
            "value": number(change["value"], score, True),
            "span": span(change, score, True),
            "p": p_value(change["p"]),
            "verdict": verdict(entry, score),
        }
    return cell


def _count_rows(benchmark: str, recipes: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
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
        rows.append(("McNemar, exact p", ["" if t is None else p_value(t["p"]) for t in tests]))
    rows.append(("cut by the token limit", [str(m["cut"]) for m in found]))
    costs = [cost_cells(m, found[0]) for m in found]
    rows += [(title, [cells[title] for cells in costs]) for title in costs[0]]
    rows.append(("median time of one", [f"{m['median_seconds'] * 1000:.0f} ms" for m in found]))
    return rows


def _plots(results: Results, benchmark: str) -> list[dict[str, str]]:
    kind, recipes = BENCHMARKS[benchmark], results.metrics[benchmark]
    scores = {score.key: score for score in results.scores(benchmark)}
    found = []
    if len(recipes) > 1:
        title = "Change against none, with 95 % intervals"
        shown = [scores[key] for key in kind.plotted(results.data(benchmark))]
        rows = [(score.title, plots.dots(recipes, score.key, change=True)) for score in shown]
        rows = [(label, dots) for label, dots in rows if dots]
        if rows:
            svg = plots.intervals(title, rows, "percentage points", zero=True, name=f"{benchmark}-change")
            found.append({"title": title, "svg": svg})
    if kind.tradeoff:
        across, up = (scores[key] for key in kind.tradeoff)
        title = f"{up.title} against {across.title}"
        pairs = list(zip(plots.dots(recipes, across.key), plots.dots(recipes, up.key), strict=False))
        axes = (f"{across.title}, percent", f"{up.title}, percent")
        svg = plots.against(title, pairs, axes, name=f"{benchmark}-values")
    else:
        title = "Values, with 95 % intervals"
        values = [(score.title, plots.dots(recipes, score.key)) for score in scores.values() if score.main]
        svg = plots.intervals(title, [row for row in values if row[1]], "percent", name=f"{benchmark}-values")
    return [*found, {"title": title, "svg": svg}]


def caption_examples(results: Results) -> dict[str, Any]:
    """Images with every recipe's caption, their objects marked; chosen by a rule that favours no recipe."""
    recipes = list(results.metrics["chair"])
    rows: dict[str, dict[str, Record]] = {}
    for recipe in recipes:
        for record in results.items("chair", recipe).values():
            view = BENCHMARKS["chair"].view(record, results.data("chair"), results.config["scoring"])
            row = {"caption": record["answer"], "marks": view.marks, "truth": view.truth}
            rows.setdefault(record["image"], {})[recipe] = row
    whole = {image: found for image, found in rows.items() if len(found) == len(recipes)}

    def rank(found: Mapping[str, Record]) -> int:
        wrong = [frozenset(mark[3] for mark in row["marks"] if not mark[2]) for row in found.values()]
        return 0 if len(set(wrong)) > 1 else 1 if any(wrong) else 2

    order = sorted(whole, key=lambda image: rank(whole[image]))[:EXAMPLES]
    return {
        "rows": [
            {
                "image": image,
                "captions": [
                    (recipe, _marked(found["caption"], found["marks"]))
                    for recipe, found in whole[image].items()
                ],
                "truth": next(iter(whole[image].values()))["truth"],
            }
            for image in order
        ],
        "differ": sum(rank(found) == 0 for found in whole.values()),
        "total": len(whole),
    }


def _marked(text: str, marks: Iterable[tuple[int, int, bool, str]]) -> list[tuple[str, str, str]]:
    """(text, kind, object) pieces of a caption: kind is "right", "wrong", or "" for other words."""
    pieces, place = [], 0
    for start, end, right, thing in sorted(marks):
        if start < place:
            continue
        pieces += [(text[place:start], "", ""), (text[start:end], "right" if right else "wrong", thing)]
        place = end
    return [*pieces, (text[place:], "", "")]


def pope_disagreements(results: Results) -> dict[str, Any] | None:
    """The first questions that the recipes answer differently, one per image."""
    from .pope import parse

    recipes = list(results.metrics["pope"])
    if len(recipes) < 2:
        return None
    parser = results.config["scoring"]["parser"]
    answers = {recipe: results.items("pope", recipe) for recipe in recipes}
    seen: set[tuple[str, str]] = set()
    found: list[Record] = []
    asked: set[tuple[str, str]] = set()
    for item, record in answers[BASELINE].items():
        key = (record["image"], record["question"])
        if key in asked:
            continue
        asked.add(key)
        label = record["label"]
        said = [(recipe, answers[recipe][item]["answer"]) for recipe in recipes]
        read = [parse(answer, parser, label) for _, answer in said]
        if len(set(read)) > 1:
            seen.add(key)
            cells = [
                (recipe, answer, value == label) for (recipe, answer), value in zip(said, read, strict=True)
            ]
            found.append(
                {"image": record["image"], "question": record["question"], "label": label, "answers": cells}
            )
    one_each = {row["image"]: row for row in reversed(found)}
    rows = [row for row in found if one_each[row["image"]] is row]
    return {"rows": rows[:DISAGREEMENTS], "differ": len(seen), "total": len(asked), "recipes": recipes}


def _setup(results: Results) -> list[tuple[str, list[str]]]:
    """What one needs to run it again: (title, lines)."""
    config = results.config
    model = config["model"]
    size = f"{_thousands(model['parameters'])} parameters, {model['dtype']}"
    lines = [
        ("model", [f"{config['model_name']}, {model['class']}, {size}"]),
        ("versions", [", ".join(f"{name} {version}" for name, version in config["versions"].items())]),
        ("draw", [f"at most {config['items']} images, seed {config['seed']}"]),
    ]
    for name, part in config["data"].items():
        facts = [str(config["source"]), f"{part['images']} images, SHA-256 {part['images_sha256'][:16]}…"]
        if "items" in part:
            version = f", version {part['version']}" if "version" in part else ""
            facts.append(f"{part['items']} items{version}, SHA-256 {part['items_sha256'][:16]}…")
        lines.append((f"{BENCHMARKS[name].title} data", facts))
    for name, prompt in config["prompts"].items():
        limit = config["generation"][name]["max_new_tokens"]
        lines.append((f"{BENCHMARKS[name].title} prompt", [prompt, f"greedy, at most {limit} new tokens"]))
    for label, parts in config["recipes"].items():
        lines.append(
            (f"recipe {label}", [_fields(part) for part in parts] or ["the same engine with a null edit"])
        )
    for session in config["sessions"]:
        facts = [session["command"]] if session["command"] else []
        facts.append(f"started {session['started']}, batch size {session['batch_size']}")
        facts.append(f"{session['device']}, Python {session['python']}")
        lines.append(("session", facts))
    return lines


def _fields(part: Mapping[str, Any]) -> str:
    return ", ".join(
        str(value) if key in ("class", "note") else f"{key}={value}" for key, value in part.items()
    )


def _engine_reports(results: Results) -> list[tuple[str, str]]:
    found = []
    for benchmark in results.metrics:
        for recipe in results.metrics[benchmark]:
            report = results.folder.read_json(f"reports/{benchmark}-{slug(recipe)}.json")
            if report:
                found.append((f"{BENCHMARKS[benchmark].title}, {recipe}", report["text"]))
    return found


def _keep_thumbnails(run: Path, names: Iterable[str], files: Mapping[str, Path]) -> None:
    from PIL import Image

    for name in names:
        kept = run / "data" / "images" / Path(name).name
        if kept.is_file() or name not in files:
            continue
        kept.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(files[name]) as image:
            small = image.convert("RGB")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        small.save(kept, quality=85)


def _data_uri(file: Path) -> str | None:
    if not file.is_file():
        return None
    from PIL import Image

    content = file.read_bytes()
    kind = (Image.open(BytesIO(content)).format or "png").lower()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
