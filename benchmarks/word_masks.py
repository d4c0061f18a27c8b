"""How well masks of words fit drawn objects: IoU on composed pictures of two subjects, whose masks are known.

    python -m benchmarks.word_masks --pictures 40 --out benchmarks/results/word-masks-miniature.json

The miniature is given each picture with its caption, the same noise for every side. Sides: `word_masks`, with its
defaults; `power=0`, without the attention of the image to itself; `otsu`, Otsu's threshold on the same attention to the
words (`masks_of`); `whole`, all cells for both words. A picture's score is the mean IoU of its two subjects, in pixels.
Intervals are bootstrap over pictures; p is of a paired permutation test, not corrected for the number of tests.
"""

import argparse
import json
import platform
import random
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import regard
from regard.evals.miniature import subjects
from regard.evals.pictures.drawn import share
from regard.evals.stats import difference, interval
from regard.interventions.places import masks_of

OURS = "word_masks"


def compose(rng: random.Random) -> tuple[list[str], Image.Image, Tensor]:
    """Two subjects, their picture, and (2, side, side) bool: the pixels of which each covers at least half."""
    names = rng.sample(subjects.SUBJECTS, 2)
    tiles: dict[str, Image.Image] = {}  # in the order in which they are pasted

    def noted(name: str, *more: Any, **options: Any) -> Image.Image:
        tiles[name] = draw(name, *more, **options)
        return tiles[name]

    draw = subjects.draw_object
    with patch.object(subjects, "draw_object", noted):
        picture = subjects.draw_picture(names, rng)
    masks: dict[str, Tensor] = {}
    for name, tile in tiles.items():
        left, top, right, _ = picture.boxes[names.index(name)]
        zoom = round(tile.width / (right - left))
        alpha = Image.new("L", [zoom * subjects.SIDE] * 2)
        alpha.paste(tile.getchannel("A"), (round(zoom * left), round(zoom * top)))
        own = torch.from_numpy(np.asarray(alpha.reduce(zoom)) > 127)
        masks = {other: mask & ~own for other, mask in masks.items()} | {name: own}
    return names, picture.image, torch.stack([masks[name] for name in names])


def sides(pipe: Any, names: list[str], picture: Image.Image, seed: int) -> dict[str, Tensor]:
    """(2, h, w) bool masks of each side."""
    seen: list[regard.TextMaps] = []
    noise, text = torch.Generator(), subjects.caption(names)
    with regard.apply(pipe, regard.Watch(tuple(names), seen.append)):
        ours, plain = (
            regard.word_masks(pipe, text, names, picture, power=power, generator=noise.manual_seed(seed))
            for power in (4, 0)
        )
    maps = next(maps for maps in seen if maps.probs.shape[1:3] == ours.maps.shape[2:])
    words = [maps.probs[..., list(tokens)].amax(-1).mean(0) for tokens in maps.concepts[0]]
    otsu = masks_of(torch.stack(words))
    return {OURS: ours.masks[0], "power=0": plain.masks[0], "otsu": otsu, "whole": torch.ones_like(otsu)}


def overlaps(masks: Tensor, true: Tensor) -> list[float]:
    """The IoU of each subject, at the true masks' size."""
    large = F.interpolate(masks[None].float(), true.shape[1:], mode="nearest")[0].bool()
    return ((large & true).sum((1, 2)) / (large | true).sum((1, 2))).tolist()


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and the noise")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pipe = regard.load_miniature("t2i")
    scores: dict[str, list[list[float]]] = {}
    empty: Counter[str] = Counter()
    for number in range(options.pictures):
        rng = random.Random(f"word masks/{options.seed}/{number}")
        names, picture, true = compose(rng)
        for side, masks in sides(pipe, names, picture, rng.getrandbits(31)).items():
            scores.setdefault(side, []).append([sum(overlaps(masks, true)), 2.0])
            empty[side] += int((~masks.flatten(1).any(1)).sum())
    keys = range(options.pictures)
    rows: dict[str, Any] = {}
    for side, own in scores.items():
        rows[side] = {"iou": interval(share, own, keys)._asdict(), "empty": empty[side]}
        line = "{value:.1%} [{low:.1%}, {high:.1%}]".format(**rows[side]["iou"])
        if side != OURS:
            change = difference(share, own, scores[OURS], keys)._asdict()
            rows[side]["ours_less_this"] = change
            line += "; ours less this {value:+.1%} [{low:+.1%}, {high:+.1%}], p {p:.4f}".format(**change)
        print(f"{side}: {line}; {empty[side]} of {2 * options.pictures} masks empty")
    if options.out:
        record = {
            "command": f"python -m benchmarks.word_masks --pictures {options.pictures} --seed {options.seed}",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "sides": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
