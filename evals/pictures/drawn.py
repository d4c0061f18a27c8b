"""What benchmarks of drawn pictures share: a folder that goes on, equal noise for every recipe, tables and a page."""

from __future__ import annotations

import base64
import io
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, ClassVar

import torch

from ..miniature.subjects import SUBJECTS, caption
from ..run_folder import EvalError, Record, RunFolder, RunFolderError
from ..settings import BASELINE, parse_options

Draw = Callable[[str, Sequence[Record]], list[Record]]
"""(recipe, a batch of items) -> the items with what was found; the pictures are saved."""


def recipe_names(recipes: str | Sequence[str], pipe: Any, given: Mapping[str, Any]) -> list[str]:
    """The recipes, each once and the baseline first; made once each, so that a wrong one shows at once.

    Args:
        recipes: names, with settings as in `astar:scale=40`.
        pipe: a diffusers pipeline.
        given: what the benchmark gives every recipe, such as the concepts.

    Raises: see `method_of`; and CannotEdit: the pipeline is not one that a recipe can be on.
    """
    from ...interventions import apply

    names = [name.strip() for name in recipes.split(",")] if isinstance(recipes, str) else list(recipes)
    names = list(dict.fromkeys([BASELINE, *names]))
    for name in names:
        with apply(pipe, *method_of(name, pipe, given)):
            pass
    return names


def method_of(name: str, pipe: Any, given: Mapping[str, Any]) -> list[Any]:
    """What to apply for a recipe: one method, or nothing for the baseline.

    Raises:
        UnknownName: no such recipe.
        EvalError: a setting that it does not have or that the benchmark gives; a recipe that cannot take what the
            benchmark gives.
        ValueError: a setting out of range.
    """
    from ...interventions import recipe

    base, options = parse_options(name)
    if base == BASELINE:
        return []
    if taken := sorted(given.keys() & options.keys()):
        raise EvalError(f"{name!r}: the benchmark itself gives {' and '.join(taken)}; leave that out")
    try:
        return [recipe(base, pipe, **given, **options)]
    except TypeError as error:
        raise EvalError(
            f"{name!r} cannot be run by this benchmark, which gives {' and '.join(given)}: {error}"
        ) from None


def open_run(
    out: str | Path,
    benchmark: str,
    pipe: Any,
    names: Sequence[str],
    *,
    items: int,
    seed: int,
    generation: Mapping[str, Any],
    command: str | None,
) -> RunFolder:
    """Start a run, or go on with the one that is there.

    Args:
        out: its folder.
        benchmark: the one benchmark that it holds.
        pipe: a diffusers pipeline.
        names: of the recipes.
        items, seed: of the choice of prompts.
        generation: what else decides a picture.
        command: noted in `config.json`.

    Raises:
        RunFolderError: the folder holds another run.
    """
    import diffusers

    from ..provenance import describe_model, versions

    path = Path(out)
    if (path / "config.json").is_file():
        held = RunFolder.load(path).config.get("benchmarks", [])
        if held != [benchmark]:
            raise RunFolderError(f"{path} holds another run, of {', '.join(held)}: choose another --out")
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    config = {
        "benchmarks": [benchmark],
        "seed": seed,
        "items": items,
        "prompts": {benchmark: caption(["X", "Y"])},
        "generation": {benchmark: dict(generation)},
        "recipes": {name: parse_options(name)[1] for name in names},
        "model": {"pipeline": type(pipe).__name__, **describe_model(denoiser, pipe.scheduler)},
        "versions": {**versions(), "diffusers": diffusers.__version__},
        "data": {},
        "sessions": [{"started": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command}],
    }
    return RunFolder.create(path, config)


def draw_missing(
    folder: RunFolder,
    benchmark: str,
    names: Sequence[str],
    batches: Sequence[Sequence[Record]],
    draw: Draw,
    progress: bool,
) -> None:
    """Draw what is not there yet, recipe by recipe and batch by batch, and note each batch as soon as it is done."""
    from rich.progress import track

    for name in names:
        folder.drop_torn_line(benchmark, name)
        done = folder.read_items(benchmark, name)
        left = [[item for item in batch if item["id"] not in done] for batch in batches]
        for batch in track([batch for batch in left if batch], f"{name:<16}", disable=not progress):
            folder.append(benchmark, name, draw(name, batch))


def noise(seed: int, item: str) -> torch.Generator:
    """The generator of one picture: the same for every recipe, whatever else is in its batch."""
    return torch.Generator().manual_seed(random.Random(f"noise/{seed}/{item}").getrandbits(31))


def seen_by(judge: Any, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Of each picture the subjects that the judge gives more than a half, and all its probabilities."""
    return [
        {
            "seen": [subject for subject, score in zip(SUBJECTS, scores, strict=True) if score > 0.5],
            "scores": [round(score, 4) for score in scores],
        }
        for scores in judge(images).tolist()
    ]


def picture_file(folder: RunFolder, benchmark: str, name: str, item: str) -> Path:
    """Where a run keeps a picture of a recipe."""
    return folder.items_file(benchmark, name).with_suffix("") / f"{item}.png"


def save_picture(image: Any, file: Path) -> None:
    """Save a Pillow image, in a new folder where need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def share(sums: Any) -> Any:
    """Sums (..., 2) to the first over the second (...): a mean of items that were counted differently often."""
    return sums[..., 0] / sums[..., 1]


class DrawnResults(ABC):
    """Scores of a run of drawn pictures, scored afresh from its items.

    Attributes:
        benchmark: its name.
        title: of the page.
        heads: of the table's columns.
        folder: the run on disk.
        items: the finished items of each recipe by id.
        rows: the scores, JSON-ready.
    """

    benchmark: ClassVar[str]
    title: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.items = {name: folder.read_items(self.benchmark, name) for name in folder.config["recipes"]}
        self.generation: Record = folder.config["generation"][self.benchmark]
        self.rows = self.score()

    @abstractmethod
    def score(self) -> list[Record]:
        """The rows of the table, as numbers."""

    @abstractmethod
    def cells(self, row: Record) -> list[str]:
        """One row as text, under `heads`."""

    def tables(self) -> list[tuple[str | None, list[Record]]]:
        """The rows in tables with their titles."""
        return [(None, self.rows)]

    @abstractmethod
    def intro(self) -> str:
        """What was drawn and how it is scored, for the page."""

    @abstractmethod
    def grids(self, pictures: int) -> list[Record]:
        """The page's pictures: {"title", "heads", "lines": [{"name", "cells": [`picture` or None]}]}."""

    @property
    def page(self) -> Path:
        """The run's page."""
        return self.folder.path / "report.html"

    def to_dict(self) -> Record:
        """JSON-ready."""
        return {"benchmark": self.benchmark, "rows": self.rows, "model": self.folder.config["model"]}

    def rich(self) -> list[Any]:
        """Tables for the terminal."""
        from rich.table import Table

        found = []
        for title, rows in self.tables():
            table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
            lines = [self.cells(row) for row in rows]
            for place, head in enumerate(self.heads):
                # in a narrow terminal names may break, numbers may not
                text, widest = head == "recipe", max((len(line[place]) for line in lines), default=1)
                head = "\n".join(wrap(head, max(widest, 5), break_long_words=False))
                table.add_column(head, justify="left" if text else "right", overflow="fold", no_wrap=not text)
            for line in lines:
                table.add_row(*line)
            found.append(table)
        return found

    def write(self) -> None:
        """Write `metrics.json` and the page."""
        self.folder.write_json("metrics.json", self.to_dict())
        self.folder.write_text("report.html", self.html())

    def html(self, pictures: int = 8) -> str:
        """The page: the tables, then the first pictures of every recipe at the same noise."""
        from jinja2 import Environment, PackageLoader

        environment = Environment(loader=PackageLoader("regard.evals.pictures", "."), autoescape=True)
        return environment.get_template("drawn.html.j2").render(
            title=self.title,
            intro=self.intro(),
            heads=self.heads,
            tables=[(title, [self.cells(row) for row in rows]) for title, rows in self.tables()],
            grids=self.grids(pictures),
            config=self.folder.config,
        )

    def picture(
        self, name: str, key: str, note: str = "", bad: bool = False, boxes: Sequence[Sequence[float]] = ()
    ) -> Record | None:
        """One picture of the page; None where its file is missing.

        Args:
            name: recipe.
            key: of the picture.
            note: text under it.
            bad: whether it is framed as wrong.
            boxes: drawn over it: left, top, right, bottom as shares.
        """
        file = picture_file(self.folder, self.benchmark, name, key)
        if not file.is_file():
            return None
        data = base64.b64encode(_enlarged(file)).decode()
        return {"data": data, "note": note, "bad": bad, "boxes": [_percent(box) for box in boxes]}


def load_drawn(path: str | Path) -> DrawnResults | None:
    """The results of a run folder; None when it holds another kind of benchmark.

    Raises:
        RunFolderError: there is no run, or one of its files cannot be read.
    """
    from .consistency import ConsistencyResults
    from .subjects import SubjectResults

    folder = RunFolder.load(path)
    kinds: tuple[type[DrawnResults], ...] = (SubjectResults, ConsistencyResults)
    for kind in kinds:
        if folder.config.get("benchmarks") == [kind.benchmark]:
            return kind(folder)
    return None


def _enlarged(file: Path, side: int = 128) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(file).resize((side, side), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue()


def _percent(box: Sequence[float]) -> str:
    """A box as a CSS position."""
    left, top, right, bottom = (100 * edge for edge in box)
    return f"left:{left:g}%;top:{top:g}%;width:{right - left:g}%;height:{bottom - top:g}%"
