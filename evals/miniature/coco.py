"""Scenes as a COCO data set: images, instances.json and captions.json."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .categories import CATEGORIES
from .language import references
from .scenes import SIDE, Difficulty, Split, make_scene

_INFO = {"description": "regard miniature scenes", "version": "1.0", "year": 2026}


def coco_files(
    folder: str | Path,
    count: int = 500,
    seed: int = 0,
    split: Split = "test",
    difficulty: str | Difficulty = "hard",
    least: int = 3,
) -> Path:
    """Write `count` scenes in COCO's format and return the folder.

    Args:
        folder: receives images/scene_000000000123.png, instances.json and captions.json.
        count: number of images.
        seed: seed of the first scene; an image's id is its seed, and the seeds rise from there.
        split: `test` scenes are never among those that the miniatures were trained on.
        difficulty: see `scenes.DIFFICULTIES`.
        least: scenes with fewer distinct categories are passed over (POPE needs three).
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    number = seed
    while len(images) < count:
        scene = make_scene(number, split, difficulty)
        if len(scene.categories) >= least:
            name = f"scene_{number:012d}.png"
            scene.image.save(folder / "images" / name)
            images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
            instances += _instances(scene.objects, number, len(instances))
            for text in references(scene):
                captions.append({"id": len(captions) + 1, "image_id": number, "caption": text})
        number += 1
    categories = [
        {"id": category.coco_id, "name": category.name, "supercategory": "object"}
        for category in sorted(CATEGORIES, key=lambda category: category.coco_id)
    ]
    common: dict[str, Any] = {"info": _INFO, "licenses": [], "images": images}
    _write(folder / "instances.json", {**common, "annotations": instances, "categories": categories})
    _write(folder / "captions.json", {**common, "annotations": captions})
    return folder


def _instances(objects: Iterable[Any], image: int, before: int) -> list[dict[str, Any]]:
    rows = []
    ids = {category.name: category.coco_id for category in CATEGORIES}
    for number, item in enumerate(objects, start=before + 1):
        left, top, width, height = item.bbox
        corners = [left, top, left + width, top, left + width, top + height, left, top + height]
        rows.append(
            {
                "id": number,
                "image_id": image,
                "category_id": ids[item.category],
                "bbox": [left, top, width, height],
                "area": item.area,
                "segmentation": [corners],
                "iscrowd": 0,
            }
        )
    return rows


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
