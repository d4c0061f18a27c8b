"""Do all the subjects of a prompt appear? Prompts of one to three subjects, every recipe at the same noise."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..miniature.subjects import SUBJECTS, caption
from ..report.tables import p_value
from ..run_folder import EvalError, Record, RunFolder
from ..settings import BASELINE
from ..stats import difference, interval, mcnemar
from .drawn import (
    DrawnResults,
    draw_missing,
    method_of,
    noise,
    open_run,
    picture_file,
    recipe_names,
    save_picture,
    seen_by,
    share,
)

BENCHMARK = "subjects"
RECIPES = "none,attend_excite,astar,isolation"
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
        UnknownName: a recipe that there is not; before anything is drawn.
        EvalError: counts without prompts; a setting that a recipe does not have.
        RunFolderError: the folder holds another run.
    """
    names = recipe_names(recipes, pipe, {"concepts": ["any"]})
    if not counts or min(counts) < 1 or max(counts) > len(SUBJECTS):
        raise EvalError(f"counts is {counts!r}: give numbers of subjects from 1 to {len(SUBJECTS)}")
    generation = {"steps": steps, "guidance_scale": guidance_scale, "counts": list(counts)}
    folder = open_run(
        out, BENCHMARK, pipe, names, items=items, seed=seed, generation=generation, command=command
    )
    try:
        batches = []
        for count in counts:
            same = prompts(count, items, seed, pipe.tokenizer)
            batches += [same[start : start + batch_size] for start in range(0, len(same), batch_size)]
        drawer = _Drawer(pipe, judge or default_judge(), folder, steps, guidance_scale, seed)
        draw_missing(folder, BENCHMARK, names, batches, drawer.draw, progress)
        results = SubjectResults(folder)
        results.write()
        return results
    finally:
        folder.close()


def default_judge() -> Judge:
    """The miniature's judge."""
    from ..miniature import load_judge

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


class _Drawer:
    """Draws and judges batches of prompts with the same number of subjects."""

    def __init__(
        self, pipe: Any, judge: Judge, folder: RunFolder, steps: int, scale: float, seed: int
    ) -> None:
        self.pipe, self.judge, self.folder, self.seed = pipe, judge, folder, seed
        self.options = {"num_inference_steps": steps, "guidance_scale": scale}

    def draw(self, name: str, batch: Sequence[Record]) -> list[Record]:
        from ...interventions import apply

        method = method_of(name, self.pipe, {"concepts": [item["subjects"] for item in batch]})
        own = [noise(self.seed, item["id"]) for item in batch]
        begun = time.perf_counter()
        with apply(self.pipe, *method):
            images = self.pipe([item["prompt"] for item in batch], generator=own, **self.options).images
        seconds = (time.perf_counter() - begun) / len(batch)
        for item, image in zip(batch, images, strict=True):
            save_picture(image, picture_file(self.folder, BENCHMARK, name, item["id"]))
        found = seen_by(self.judge, images)
        return [{**item, **own, "seconds": seconds} for item, own in zip(batch, found, strict=True)]


class SubjectResults(DrawnResults):
    """Scores of a run: the share of pictures with all subjects, and of subjects that appear, with paired tests."""

    benchmark = BENCHMARK
    title = "Do all subjects appear?"
    heads = (
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

    def score(self) -> list[Record]:
        """One row for each number of subjects and recipe."""
        return [row for count in self.generation["counts"] for row in self._rows(count)]

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
                    "all": interval(share, all_there, keys, proportion=True)._asdict(),
                    "appear": interval(share, some, keys, proportion=True)._asdict(),
                    "seconds": float(np.median(seconds)),
                    "change": None
                    if name == BASELINE
                    else difference(share, before, all_there, keys)._asdict(),
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

    def intro(self) -> str:
        """What was drawn and how it is scored."""
        config = self.folder.config
        return (
            f"{config['model']['pipeline']}, {config['items']} prompts for each number of subjects, "
            f"{self.generation['steps']} steps, guidance {self.generation['guidance_scale']}, the same noise for every "
            f"recipe (seed {config['seed']}). Changes are against none; gained and lost count pictures; p is the exact "
            "McNemar test."
        )

    def grids(self, pictures: int) -> list[Record]:
        """For each number of subjects the first prompts with every recipe."""
        grids = []
        for count in self.generation["counts"]:
            shown = [item for item in self.items[BASELINE].values() if len(item["subjects"]) == count]
            shown = shown[:pictures]
            lines = [
                {"name": name, "cells": [self._cell(name, item["id"]) for item in shown]}
                for name in self.items
            ]
            title = f"{count} subject{'s' if count > 1 else ''}"
            grids.append({"title": title, "heads": [item["prompt"] for item in shown], "lines": lines})
        return grids

    def _cell(self, name: str, key: str) -> Record | None:
        item = self.items[name].get(key)
        if item is None:
            return None
        missing = [subject for subject in item["subjects"] if subject not in item["seen"]]
        return self.picture(
            name, key, note=f"not seen: {', '.join(missing)}" if missing else "", bad=bool(missing)
        )

    def cells(self, row: Record) -> list[str]:
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
            "" if test is None else p_value(test["p"]),
            f"{row['seconds']:.2f}",
        ]
