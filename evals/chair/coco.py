"""COCO annotations as the objects of each image, by CHAIR's rule: instances and reference captions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..benchmark import Request
from ..run_folder import EvalError
from ..sources import DataError, only
from .scoring import chair_configuration, ground_truth


def settle_words(scoring: Mapping[str, Any]) -> dict[str, str]:
    """CHAIR's configuration and its words, by the name under "chair".

    Raises:
        UnknownName: no configuration has that name.
        EvalError: it needs nltk or its data, which are not here.
    """
    try:
        chosen = chair_configuration(scoring.get("chair"))
    except (ImportError, LookupError) as error:
        raise EvalError(f"CHAIR: {error}") from error
    return {"chair": chosen.name, "words": chosen.words, "truth_words": chosen.truth}


def objects_by_image(request: Request) -> dict[str, list[str]]:
    """Image name -> objects in it, the annotated ones first.

    Raises:
        DataError: annotations are missing or cannot be read, or none of the wanted images is annotated.
    """
    sources, name = request.sources, request.name
    if not sources.instances:
        raise DataError(
            f"{name} holds no instances*.json and no POPE questions: put COCO's instances (and captions) there, "
            "for instance annotations/instances_val2014.json"
        )
    if not sources.captions:
        raise DataError(
            f"{name} holds no captions*.json: the ground truth of CHAIR and POPE takes in COCO's reference "
            "captions, for instance annotations/captions_val2014.json"
        )
    instances, captions = _pooled(sources.instances), _pooled(sources.captions)
    names = {int(image["id"]): str(image["file_name"]) for image in instances["images"]}
    kept = set(only(names.values(), request.wanted))
    if not kept:
        raise DataError(f"none of the images in {sources.names} has annotations in {name}")
    keep = {number for number, image in names.items() if image in kept}
    for part in (instances, captions):
        part["annotations"] = [row for row in part["annotations"] if row["image_id"] in keep]
    names = {number: image for number, image in names.items() if number in keep}
    return objects_of(instances, captions, names, request.scoring["truth_words"])


def objects_of(
    instances: Mapping[str, Any], captions: Mapping[str, Any], names: Mapping[int, str], words: str
) -> dict[str, list[str]]:
    """Objects of each image by CHAIR's rule: annotated ones first, in COCO's order, then those of captions."""
    found = ground_truth(instances, captions, words)
    categories = {row["id"]: row["name"] for row in instances["categories"]}
    seen: dict[int, dict[str, None]] = {number: {} for number in names}
    for row in instances["annotations"]:
        seen[row["image_id"]][categories[row["category_id"]]] = None
    objects = {}
    for number, image in names.items():
        true = found[number]
        annotated = [thing for thing in seen[number] if thing in true]
        objects[image] = annotated + sorted(true.difference(annotated))
    return objects


def _pooled(files: Sequence[Path]) -> dict[str, Any]:
    pooled: dict[str, Any] = {"images": [], "annotations": []}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            pooled["images"] += content["images"]
            pooled["annotations"] += content["annotations"]
            if "categories" in content:  # captions have none, and pycocotools goes by that
                pooled["categories"] = content["categories"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is no COCO annotation file ({type(error).__name__}: {error})") from error
    return pooled
