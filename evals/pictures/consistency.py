"""Do subjects of a scene look like their portraits? Joint batches of two portraits and a scene, at the same noise.

The question is IR-Diffusion's (arXiv 2411.19261), the benchmark is ours: the paper's stories, detector and encoders
are not here.

The first subject's target is the left half of the scene, the second's the right half. Each lane is cut out, made
square by repeating its outermost columns, so that the judge sees no squashed subject, and embedded; portraits are
embedded whole. Cosines of these say:

- own, other: a lane to the portrait of the subject it is for, and to that of the other subject.
- own, either order: the same where each lane goes to the subject it looks more like (all portraits of that subject in
  the run vote). A plain scene was never told who stands where, and only this score is fair to it.
- own less its kind: in that order, what remains above the mean cosine to other portraits of the same subject. A scene
  that shows the right kind of thing, but not this one, has 0.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..miniature.subjects import caption, colours, draw_picture
from ..report.tables import p_value
from ..run_folder import Record, RunFolder
from ..settings import BASELINE
from ..stats import difference, interval
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
from .subjects import prompts

BENCHMARK = "consistency"
RECIPES = (
    "none,ir_diffusion,ir_diffusion:mutual_cross=0,ir_diffusion:reference=False,"
    "ir_diffusion:reference=False:mutual_cross=0"
)
LANES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
"""Where a scene's first and second subject are asked to be: left, top, right, bottom as shares of the picture."""
PORTRAIT = (0.15, 0.2, 0.85, 0.95)
"""Where a portrait's subject is: the training pictures of the miniature have a single subject nowhere else."""
COMPOSED = "composed"
"""The row of pictures that were never generated: the best that the judge's cosines can be expected to be."""
SCORES = {
    "own": "cosine to the own portrait",
    "other": "cosine to the other subject's portrait",
    "own_less_other": "own less other",
    "in_order": "scenes with the subjects in the order asked, %",
    "own_either": "cosine to the own portrait, either order",
    "own_less_kind": "own less its kind, either order",
    "both": "scenes with both subjects, %",
}
TITLES = {**SCORES, "seconds": "seconds a batch of two portraits and a scene"}
_SHARES = ("in_order", "both")
Counts = npt.NDArray[np.float64]


class Judge(Protocol):
    """Tells subjects, and how alike pictures are."""

    def __call__(self, pictures: Sequence[Any]) -> torch.Tensor:
        """(B, subjects) probabilities that each of `SUBJECTS` is there."""

    def embed(self, pictures: Sequence[Any]) -> torch.Tensor:
        """(B, D) features of length 1."""


def evaluate_consistency(
    pipe: Any,
    judge: Judge | None = None,
    recipes: str | Sequence[str] = RECIPES,
    *,
    out: str | Path,
    items: int = 40,
    seed: int = 0,
    steps: int = 50,
    guidance_scale: float = 7.5,
    command: str | None = None,
    progress: bool = True,
) -> ConsistencyResults:
    """Draw pairs of subjects as two portraits and a scene in one batch, and compare lanes of the scene to portraits.

    Args:
        pipe: a diffusers pipeline with a U-Net that knows the miniature's subjects.
        judge: default is the miniature's, `load_judge()`.
        recipes: settings of `ir_diffusion`, as in `ir_diffusion:mutual_cross=0`; "none", the baseline, always runs.
        out: folder of the run; an unfinished run there goes on.
        items: scenes. They are those of `evaluate_subjects` with two subjects, at the same noise.
        seed: of the choice of pairs and of the noise.
        steps, guidance_scale: of the pipeline.
        command: noted in `config.json`.
        progress: show a bar.

    Raises:
        UnknownName: a recipe that there is not; before anything is drawn.
        EvalError: a recipe that takes no portraits, or a setting that it does not have.
        CannotEdit: a pipeline without a U-Net.
        RunFolderError: the folder holds another run.
    """
    names = recipe_names(recipes, pipe, _places())
    generation = {"steps": steps, "guidance_scale": guidance_scale, "lanes": LANES, "portrait": PORTRAIT}
    folder = open_run(
        out, BENCHMARK, pipe, names, items=items, seed=seed, generation=generation, command=command
    )
    try:
        if judge is None:
            from ..miniature import load_judge

            judge = load_judge()
        work = prompts(2, items, seed, pipe.tokenizer)
        folder.write_json("data/composed.json", [compose(judge, item, seed) for item in work])
        drawer = _Drawer(pipe, judge, folder, steps, guidance_scale, seed)
        draw_missing(folder, BENCHMARK, names, [[item] for item in work], drawer.draw, progress)
        results = ConsistencyResults(folder)
        results.write()
        return results
    finally:
        folder.close()


def _places() -> dict[str, Any]:
    return {"portraits": [PORTRAIT, PORTRAIT], "scene": list(LANES)}


class _Drawer:
    """Draws and judges one joint batch: the engine knows no batch of several scenes with other portraits each."""

    def __init__(
        self, pipe: Any, judge: Judge, folder: RunFolder, steps: int, scale: float, seed: int
    ) -> None:
        self.pipe, self.judge, self.folder, self.seed = pipe, judge, folder, seed
        self.options = {"num_inference_steps": steps, "guidance_scale": scale}

    def draw(self, name: str, batch: Sequence[Record]) -> list[Record]:
        from ...interventions import apply

        (item,) = batch
        keys = picture_keys(item)
        texts = [*(caption([subject]) for subject in item["subjects"]), item["prompt"]]
        own = [noise(self.seed, key) for key in keys]
        begun = time.perf_counter()
        with apply(self.pipe, *method_of(name, self.pipe, _places())):
            images = self.pipe(texts, generator=own, **self.options).images
        seconds = time.perf_counter() - begun
        for key, image in zip(keys, images, strict=True):
            save_picture(image, picture_file(self.folder, BENCHMARK, name, key))
        return [{**item, **_judged(self.judge, images[:-1], images[-1], LANES), "seconds": seconds}]


def picture_keys(item: Record) -> list[str]:
    """Names of the pictures of an item, and of their noise: its portraits, then the scene."""
    return [*(f"{item['id']}-portrait-{place}" for place in range(len(item["subjects"]))), item["id"]]


def lane_of(picture: Any, box: Sequence[float]) -> Any:
    """The box of a Pillow image, made square: its outermost columns (or rows) are repeated on both sides."""
    from PIL import Image

    edges = [round(edge * side) for edge, side in zip(box, [*picture.size, *picture.size], strict=True)]
    pixels = np.asarray(picture.convert("RGB").crop(edges))
    height, width = pixels.shape[:2]
    missing = [max(height, width) - side for side in (height, width)]
    sides = [(less // 2, less - less // 2) for less in missing]
    return Image.fromarray(np.pad(pixels, [*sides, (0, 0)], mode="edge"))


def _judged(judge: Judge, portraits: Sequence[Any], scene: Any, lanes: Sequence[Any]) -> Record:
    """What an item keeps: embeddings of portraits and lanes (2, D), and the subjects seen in the scene."""
    cut = [lane_of(scene, box) for box in lanes]
    return {
        "portraits": judge.embed(portraits).double().numpy().round(6).tolist(),
        "lanes": judge.embed(cut).double().numpy().round(6).tolist(),
        **seen_by(judge, [scene])[0],
    }


def compose(judge: Judge, item: Record, seed: int) -> Record:
    """The same pair as pictures that the program of the training pictures draws, portrait and scene of one colour."""
    rng = random.Random(f"composed/{seed}/{item['id']}")
    tints = [rng.choice(colours(name)) for name in item["subjects"]]
    portraits = [
        draw_picture([name], rng, [tint]).image for name, tint in zip(item["subjects"], tints, strict=True)
    ]
    scene = draw_picture(item["subjects"], rng, tints)
    first, second = ((left + right) / 2 for left, _, right, _ in scene.boxes)
    lanes = LANES if first < second else LANES[::-1]
    return {**item, **_judged(judge, portraits, scene.image, lanes)}


def cosines(items: Mapping[str, Record]) -> dict[str, Counts]:
    """Each of `SCORES` of each item as (N, 2): a sum, and of how many numbers.

    Args:
        items: finished items of one recipe; in both orders, portraits of one subject in all of them are of a kind.
    """
    found = list(items.values())
    lanes, portraits = (np.array([item[key] for item in found]) for key in ("lanes", "portraits"))
    every = np.einsum("nid,mjd->nimj", lanes, portraits)
    names = np.array([item["subjects"] for item in found])
    number = np.arange(len(found))
    own = every[number, :, number]  # (N, lane, subject)
    same = names[:, :, None, None] == names  # (N, subject, N, subject)
    same[number, :, number] = False
    kin = same.sum((2, 3))
    of_kind = np.einsum("nimk,njmk->nij", every, same.astype(float))
    alike = (own + of_kind) / (1 + kin[:, None])
    turned = np.trace(alike[:, ::-1], axis1=1, axis2=2) > np.trace(alike, axis1=1, axis2=2)
    placed, placed_kind = (
        np.diagonal(np.where(turned[:, None, None], each[:, ::-1], each), axis1=1, axis2=2)
        for each in (own, of_kind)
    )
    asked, other = (np.trace(each, axis1=1, axis2=2) for each in (own, own[:, ::-1]))
    less_kind = np.where(kin > 0, placed - placed_kind / np.maximum(kin, 1), 0)
    both = [set(item["subjects"]) <= set(item["seen"]) for item in found]
    two, one = np.full(len(found), 2.0), np.ones(len(found))
    columns = {
        "own": (asked, two),
        "other": (other, two),
        "own_less_other": (asked - other, two),
        "in_order": (~turned, one),
        "own_either": (placed.sum(1), two),
        "own_less_kind": (less_kind.sum(1), (kin > 0).sum(1)),
        "both": (both, one),
    }
    return {key: np.stack(pair, 1).astype(float) for key, pair in columns.items()}


class ConsistencyResults(DrawnResults):
    """Scores of a run: cosines of lanes to portraits and shares of scenes, with paired tests against none."""

    benchmark = BENCHMARK
    title = "Do subjects of a scene look like their portraits?"
    heads = ("recipe", "value", "95 %", "change", "95 % of it", "p", "scenes")

    def score(self) -> list[Record]:
        """One row for each score and recipe, the composed pictures last; then the seconds."""
        base = self.items[BASELINE]
        composed = {item["id"]: item for item in self.folder.read_json("data/composed.json", [])}
        found: dict[str, list[Record]] = {key: [] for key in SCORES}
        seconds = []
        for name, own in [*self.items.items(), (COMPOSED, composed)]:
            ids = [key for key in own if key in base]
            if not ids:
                continue
            before, after = (cosines({key: items[key] for key in ids}) for items in (base, own))
            paired = name not in (BASELINE, COMPOSED)
            for key in SCORES:
                if (row := _row(key, name, ids, before[key] if paired else None, after[key])) is not None:
                    found[key].append(row)
            if name != COMPOSED:
                median = float(np.median([own[key]["seconds"] for key in ids]))
                seconds.append({"score": "seconds", "recipe": name, "value": median, "scenes": len(ids)})
        return [*(row for rows in found.values() for row in rows), *seconds]

    def tables(self) -> list[tuple[str | None, list[Record]]]:
        """A table for each score."""
        return [(title, [row for row in self.rows if row["score"] == key]) for key, title in TITLES.items()]

    def cells(self, row: Record) -> list[str]:
        """One row as text."""
        if row["score"] == "seconds":
            return [row["recipe"], f"{row['value']:.2f}", *[""] * 4, str(row["scenes"])]
        percent = row["score"] in _SHARES
        value, change = row["value"], row["change"]
        number = "{:.1f}" if percent else "{:.3f}"
        signed = number.replace(":", ":+")
        return [
            row["recipe"],
            *_spanned(value, number, percent),
            *(("", "", "") if change is None else (*_spanned(change, signed, percent), p_value(change["p"]))),
            str(row["scenes"]),
        ]

    def intro(self) -> str:
        """What was drawn and how it is scored."""
        config = self.folder.config
        return (
            f"{config['model']['pipeline']}, {config['items']} pairs of subjects, {self.generation['steps']} steps, "
            f"guidance {self.generation['guidance_scale']}, the same noise for every recipe (seed {config['seed']}); "
            "two portraits and the scene are one batch. Values are cosines by the judge's embedding of a half of the "
            "scene to a portrait, or shares of scenes. The first subject is asked for on the left. In either order, "
            "each half belongs to the subject that it looks more like; its kind are the other portraits of the same "
            "subject. Composed pictures are drawn by program, portrait and scene of one colour: the scale of what is "
            "possible. Changes are against none, intervals are bootstrap over scenes, p is of a paired permutation "
            "test."
        )

    def grids(self, pictures: int) -> list[Record]:
        """The first pairs: portraits with their box, and every recipe's scene with its lanes."""
        shown = list(self.items[BASELINE].values())[:pictures]
        lines = []
        for place in range(2):
            cells = [
                self.picture(BASELINE, picture_keys(item)[place], boxes=[self.generation["portrait"]])
                for item in shown
            ]
            lines.append({"name": f"portrait {place + 1}", "cells": cells})
        lines += [
            {"name": name, "cells": [self._scene(name, item["id"]) for item in shown]} for name in self.items
        ]
        heads = [item["prompt"] for item in shown]
        return [{"title": "Portraits, and scenes", "heads": heads, "lines": lines}]

    def _scene(self, name: str, key: str) -> Record | None:
        item = self.items[name].get(key)
        if item is None:
            return None
        own = (np.array(item["lanes"]) * np.array(item["portraits"])).sum(1)
        missing = [subject for subject in item["subjects"] if subject not in item["seen"]]
        note = f"own {own[0]:.2f}, {own[1]:.2f}" + (f"; not seen: {', '.join(missing)}" if missing else "")
        return self.picture(name, key, note=note, bad=bool(missing), boxes=self.generation["lanes"])


def _row(key: str, name: str, ids: list[str], before: Counts | None, after: Counts) -> Record | None:
    """One score of one recipe; None where no scene has it."""
    there = after[:, 1] > 0
    if not there.any():
        return None
    kept = np.array(ids)[there]
    value = interval(share, after[there], kept, proportion=key in _SHARES)
    change = None if before is None else difference(share, before[there], after[there], kept)._asdict()
    return {
        "score": key,
        "recipe": name,
        "scenes": len(kept),
        "value": value._asdict(),
        "change": change,
    }


def _spanned(found: Mapping[str, float], form: str, percent: bool) -> tuple[str, str]:
    """A value and its interval, which a single scene does not have."""
    value, low, high = (found[key] * (100 if percent else 1) for key in ("value", "low", "high"))
    return form.format(value), "" if low != low else f"{form.format(low)} to {form.format(high)}"
