"""Do all the subjects of a prompt appear? Prompts of one to three subjects, every recipe at the same noise."""

from __future__ import annotations

import base64
import io
import random
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .miniature.subjects import SUBJECTS, caption
from .run_folder import EvalError, RunFolder
from .settings import BASELINE, parse_options
from .stats import difference, interval, mcnemar

BENCHMARK = "subjects"
RECIPES = "none,attend_excite,astar,isolation"
HEADS = (
    "subjects",
    "recipe",
    "all there %",
    "95 %",
    "each there %",
    "change",
    "gained/lost",
    "p",
    "s/picture",
)
Judge = Callable[[Sequence[Any]], torch.Tensor]
"""Pictures -> (B, subjects) probabilities that each of `SUBJECTS` is there."""


def evaluate_subjects(
    pipe: Any,
    judge: Judge | None = None,
    recipes: str | Sequence[str] = RECIPES,
    *,
    out: str | Path,
    items: int = 90,
    counts: Sequence[int] = (1, 2, 3),
    seed: int = 0,
    steps: int = 50,
    guidance_scale: float = 7.5,
    batch_size: int = 10,
    command: str | None = None,
    progress: bool = True,
) -> SubjectResults:
    """Draw the same prompts from the same noise with each recipe, and count the subjects that the judge sees.

    Args:
        pipe: a diffusers pipeline that knows the miniature's subjects.
        judge: default is the miniature's, `load_judge()`.
        recipes: names, with settings as in `astar:scale=40`; "none", the baseline, always runs.
        out: folder of the run; an unfinished run there goes on.
        items: prompts for each number of subjects.
        counts: numbers of subjects in a prompt.
        seed: of the choice of prompts and of the noise.
        steps, guidance_scale: of the pipeline.
        batch_size: pictures at once.
        command: noted in `config.json`.
        progress: show a bar.

    Raises:
        UnknownName, TypeError: a recipe or setting that there is not; before anything is drawn.
        EvalError: counts without prompts.
        RunFolderError: the folder holds another run.
    """
    names = _names(recipes, pipe)
    if not counts or min(counts) < 1 or max(counts) > len(SUBJECTS):
        raise EvalError(f"counts is {counts!r}: give numbers of subjects from 1 to {len(SUBJECTS)}")
    folder = RunFolder.create(out, _config(pipe, names, items, seed, steps, guidance_scale, counts, command))
    try:
        work = [item for count in counts for item in prompts(count, items, seed, pipe.tokenizer)]
        drawer = _Drawer(pipe, judge or default_judge(), folder, steps, guidance_scale, seed)
        for name in names:
            folder.drop_torn_line(BENCHMARK, name)
            done = folder.read_items(BENCHMARK, name)
            drawer.run(name, [item for item in work if item["id"] not in done], batch_size, progress)
        results = SubjectResults(folder)
        results.write()
        return results
    finally:
        folder.close()


def _names(recipes: str | Sequence[str], pipe: Any) -> list[str]:
    """The recipes, each once and the baseline first; made once each, so that a wrong one shows at once."""
    from ..interventions import recipe

    names = [name.strip() for name in recipes.split(",")] if isinstance(recipes, str) else list(recipes)
    names = list(dict.fromkeys([BASELINE, *names]))
    for name in names[1:]:
        base, options = parse_options(name)
        recipe(base, pipe, concepts=["any"], **options)
    return names


def default_judge() -> Judge:
    """The miniature's judge."""
    from .miniature import load_judge

    return load_judge()


def prompts(count: int, items: int, seed: int, tokenizer: Any = None) -> list[dict[str, Any]]:
    """The items of one number of subjects: every combination that the tokenizer has room for in turn, each shuffled."""
    rng = random.Random(f"subjects/{count}/{seed}")
    every = list(combinations(SUBJECTS, count))
    if tokenizer is not None:
        every = [few for few in every if len(tokenizer(caption(few)).input_ids) <= tokenizer.model_max_length]
    rng.shuffle(every)
    found = []
    for number in range(items):
        chosen = list(every[number % len(every)])
        rng.shuffle(chosen)
        found.append({"id": f"{count}-{number}", "subjects": chosen, "prompt": caption(chosen)})
    return found


def _config(
    pipe: Any,
    names: list[str],
    items: int,
    seed: int,
    steps: int,
    scale: float,
    counts: Sequence[int],
    command: Any,
) -> dict[str, Any]:
    import diffusers

    from .provenance import describe_model, versions

    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    return {
        "benchmarks": [BENCHMARK],
        "seed": seed,
        "items": items,
        "prompts": {BENCHMARK: caption(["X", "Y"])},
        "generation": {BENCHMARK: {"steps": steps, "guidance_scale": scale, "counts": list(counts)}},
        "recipes": {name: parse_options(name)[1] for name in names},
        "model": {"pipeline": type(pipe).__name__, **describe_model(denoiser, pipe.scheduler)},
        "versions": {**versions(), "diffusers": diffusers.__version__},
        "data": {},
        "sessions": [{"started": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command}],
    }


class _Drawer:
    """Draws and judges the missing items of one recipe after the other."""

    def __init__(
        self, pipe: Any, judge: Judge, folder: RunFolder, steps: int, scale: float, seed: int
    ) -> None:
        self.pipe, self.judge, self.folder, self.seed = pipe, judge, folder, seed
        self.options = {"num_inference_steps": steps, "guidance_scale": scale}

    def run(self, name: str, work: list[dict[str, Any]], batch_size: int, progress: bool) -> None:
        """Batches of prompts with the same number of subjects."""
        from rich.progress import track

        batches = []
        for count in sorted({len(item["subjects"]) for item in work}):
            same = [item for item in work if len(item["subjects"]) == count]
            batches += [same[start : start + batch_size] for start in range(0, len(same), batch_size)]
        for batch in track(batches, f"{name:<16}", disable=not progress):
            self._batch(name, batch)

    def _batch(self, name: str, batch: list[dict[str, Any]]) -> None:
        from ..interventions import apply, recipe

        base, options = parse_options(name)
        concepts = [item["subjects"] for item in batch]
        method = [] if base == BASELINE else [recipe(base, self.pipe, concepts=concepts, **options)]
        own = [torch.Generator().manual_seed(_noise_seed(self.seed, item["id"])) for item in batch]
        begun = time.perf_counter()
        with apply(self.pipe, *method):
            images = self.pipe([item["prompt"] for item in batch], generator=own, **self.options).images
        seconds = (time.perf_counter() - begun) / len(batch)
        records = []
        for item, image, scores in zip(batch, images, self.judge(images).tolist(), strict=True):
            seen = [subject for subject, score in zip(SUBJECTS, scores, strict=True) if score > 0.5]
            file = picture_file(self.folder, name, item["id"])
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
            records.append(
                {**item, "seen": seen, "seconds": seconds, "scores": [round(s, 4) for s in scores]}
            )
        self.folder.append(BENCHMARK, name, records)


def picture_file(folder: RunFolder, name: str, item: str) -> Path:
    """Where a run keeps the picture of an item."""
    return folder.items_file(BENCHMARK, name).with_suffix("") / f"{item}.png"


def _noise_seed(seed: int, item: str) -> int:
    return random.Random(f"noise/{seed}/{item}").getrandbits(31)


class SubjectResults:
    """Scores of a run: the share of pictures with all subjects, and of subjects that appear, with paired tests."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        names = list(folder.config["recipes"])
        self.items = {name: folder.read_items(BENCHMARK, name) for name in names}
        self.counts = folder.config["generation"][BENCHMARK]["counts"]
        self.rows = [row for count in self.counts for row in self._rows(count)]

    @property
    def page(self) -> Path:
        """The run's page."""
        return self.folder.path / "report.html"

    def _rows(self, count: int) -> list[dict[str, Any]]:
        """One row a recipe: pictures with all, subjects that appear, against the baseline."""
        base = self._right(BASELINE, count)
        rows = []
        for name in self.items:
            right = {key: value for key, value in self._right(name, count).items() if key in base}
            if not right:
                continue
            keys = sorted(right)
            all_there = np.array([[float(right[key] == count), 1.0] for key in keys])
            some = np.array([[float(right[key]), float(count)] for key in keys])
            before = np.array([[float(base[key] == count), 1.0] for key in keys])
            seconds = [self.items[name][key]["seconds"] for key in keys]
            rows.append(
                {
                    "subjects": count,
                    "recipe": name,
                    "pictures": len(keys),
                    "all": interval(_share, all_there, keys, proportion=True)._asdict(),
                    "appear": interval(_share, some, keys, proportion=True)._asdict(),
                    "seconds": float(np.median(seconds)),
                    "change": None
                    if name == BASELINE
                    else difference(_share, before, all_there, keys)._asdict(),
                    "mcnemar": None if name == BASELINE else mcnemar(before[:, 0], all_there[:, 0])._asdict(),
                }
            )
        return rows

    def _right(self, name: str, count: int) -> dict[str, int]:
        """How many of its subjects each picture shows."""
        return {
            key: sum(subject in item["seen"] for subject in item["subjects"])
            for key, item in self.items[name].items()
            if len(item["subjects"]) == count
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"benchmark": BENCHMARK, "rows": self.rows, "model": self.folder.config["model"]}

    def rich(self) -> list[Any]:
        """Tables for the terminal."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in HEADS:
            table.add_column(column, justify="left" if column == "recipe" else "right")
        for row in self.rows:
            table.add_row(*cells(row))
        return [table]

    def write(self) -> None:
        """Write `metrics.json` and the page."""
        self.folder.write_json("metrics.json", self.to_dict())
        self.folder.write_text("report.html", self.html())

    def html(self, pictures: int = 8) -> str:
        """The page: the table, then the first pictures of every recipe at the same noise."""
        from jinja2 import Environment, PackageLoader

        grids = []
        for count in self.counts:
            shown = [key for key, item in self.items[BASELINE].items() if len(item["subjects"]) == count][
                :pictures
            ]
            lines = [
                {"recipe": name, "cells": [self._cell(name, key) for key in shown]} for name in self.items
            ]
            titles = [self.items[BASELINE][key]["prompt"] for key in shown]
            grids.append({"count": count, "titles": titles, "lines": lines})
        environment = Environment(loader=PackageLoader("regard.evals", "."), autoescape=True)
        page = environment.get_template("subjects.html.j2")
        config = self.folder.config
        return page.render(rows=[cells(row) for row in self.rows], heads=HEADS, grids=grids, config=config)

    def _cell(self, name: str, key: str) -> dict[str, Any] | None:
        item, file = self.items[name].get(key), picture_file(self.folder, name, key)
        if item is None or not file.is_file():
            return None
        data = base64.b64encode(_enlarged(file)).decode()
        missing = [subject for subject in item["subjects"] if subject not in item["seen"]]
        return {"data": data, "missing": missing}


def _enlarged(file: Path, side: int = 128) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(file).resize((side, side), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue()


def _share(sums: Any) -> Any:
    return sums[..., 0] / sums[..., 1]


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text."""
    whole, change, test = row["all"], row["change"], row["mcnemar"]
    return [
        str(row["subjects"]),
        row["recipe"],
        f"{100 * whole['value']:.1f}",
        f"{100 * whole['low']:.1f} to {100 * whole['high']:.1f}",
        f"{100 * row['appear']['value']:.1f}",
        "" if change is None else f"{100 * change['value']:+.1f}",
        "" if test is None else f"{test['gained']}/{test['lost']}",
        "" if test is None else f"{test['p']:.3f}",
        f"{row['seconds']:.2f}",
    ]
