"""What a run asks: the POPE questions, the objects of each image, and the image files."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .chair import ground_truth
from .pope import Question, build_pope, load_pope, pope_version
from .sources import DataError, ImageIndex, Sources, find_sources, image_sizes, only, read_names

MINIATURE = "miniature"
_POSITIVES = 3  # POPE asks for three objects that are there, so an image needs as many
_SEED_STRIDE = 1_000_000  # the miniature's scenes count up from their seed; two runs should share none

_LIST_ADVICE = "add them, or name the images that you want, one per line, in images.txt in the data folder"


@dataclass(frozen=True)
class Dataset:
    """The items of one run.

    Attributes:
        name: "miniature", or the folder as the user gave it.
        questions: POPE's questions by split; empty when POPE is not asked for.
        truth: for CHAIR, the objects that are in each image that is to be described; empty without CHAIR.
        files: the file of every image that is used.
        sizes: their (width, height).
    """

    name: str
    questions: dict[str, list[Question]] = field(default_factory=dict)
    truth: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What identifies the items of each benchmark, for `config.json`."""
        found: dict[str, Any] = {}
        if self.questions:
            rows = [q for split in self.questions.values() for q in split]
            text = "\n".join(f"{q.split}|{q.question_id}|{q.image}|{q.text}|{q.label}" for q in rows)
            found["pope"] = {
                **self._images(dict.fromkeys(q.image for q in rows)),
                "questions": len(rows),
                "questions_sha256": hashlib.sha256(text.encode()).hexdigest(),
                "version": pope_version(self.questions),
            }
        if self.truth:
            found["chair"] = self._images(self.truth)
        return found

    def _images(self, names: Mapping[str, Any]) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name in sorted(names):
            digest.update(f"{name}\n".encode())
            digest.update(hashlib.sha256(self.files[name].read_bytes()).digest())
        return {"images": len(names), "images_sha256": digest.hexdigest()}


def load_data(
    data: str | Path | Sources, benchmarks: Sequence[str], items: int, seed: int, scratch: Path, words: str
) -> Dataset:
    """Collect the items of a run, and check that every image is there.

    Args:
        data: "miniature", a data folder, or `Sources`.
        benchmarks: "pope", "chair" or both.
        items: most images of each benchmark; they are drawn with the seed when there are more.
        seed: of the draw, of the miniature's scenes and of the questions that are built.
        scratch: where the miniature's scenes are drawn.
        words: the CHAIR word list and reduction that makes the ground truth.

    Raises:
        DataError: something is missing; the message says what, and what to do.
    """
    if items < 1:
        raise DataError(f"items={items}: at least one image is needed")
    name = str(data.images if isinstance(data, Sources) else data)
    if name == MINIATURE:
        from .miniature.coco import coco_files

        data = coco_files(scratch, items, seed * _SEED_STRIDE)
    sources = data if isinstance(data, Sources) else find_sources(data)
    index = ImageIndex(sources.images)
    wanted = read_names(sources.names) if sources.names else None
    questions: dict[str, list[Question]] = {}
    truth: dict[str, list[str]] = {}
    if "pope" in benchmarks:
        questions = _questions(name, sources, wanted, items, seed, words)
    if "chair" in benchmarks:
        truth = _sample(_truth(name, sources, wanted, words), items, f"{seed}/chair")
    needed = dict.fromkeys([*(q.image for rows in questions.values() for q in rows), *truth])
    files = index.require(list(needed), _LIST_ADVICE)
    return Dataset(name, questions, truth, files, image_sizes(files))


def _questions(
    name: str, sources: Sources, wanted: Sequence[str] | None, items: int, seed: int, words: str
) -> dict[str, list[Question]]:
    if sources.questions is None:
        objects = _truth(name, sources, wanted, words)
        return build_questions(name, objects, items, seed)
    splits = load_pope(sources.questions)
    images = only(dict.fromkeys(q.image for rows in splits.values() for q in rows), wanted)
    if not images:
        raise DataError(f"none of the images in {sources.names} has a question in {sources.questions}")
    kept = set(_sample(dict.fromkeys(images), items, f"{seed}/pope"))
    return {split: [q for q in rows if q.image in kept] for split, rows in splits.items()}


def build_questions(
    name: str, objects: Mapping[str, Sequence[str]], items: int, seed: int
) -> dict[str, list[Question]]:
    """POPE questions by the published rules for at most `items` of these images."""
    usable = sum(len(set(things)) >= _POSITIVES for things in objects.values())
    if not usable:
        raise DataError(
            f"none of the {len(objects)} images of {name} has {_POSITIVES} annotated objects, which POPE needs"
        )
    return build_pope(objects, images=min(items, usable), seed=seed)


def _sample(entries: Mapping[str, Any], items: int, seed: str) -> dict[str, Any]:
    """At most so many entries, drawn with the seed, in their own order."""
    if len(entries) <= items:
        return dict(entries)
    drawn = set(random.Random(seed).sample(sorted(entries), items))
    return {name: value for name, value in entries.items() if name in drawn}


def _truth(name: str, sources: Sources, wanted: Sequence[str] | None, words: str) -> dict[str, list[str]]:
    """Image name -> objects in it, by CHAIR's rule: instances and reference captions."""
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
    kept = set(only(names.values(), wanted))
    if not kept:
        raise DataError(f"none of the images in {sources.names} has annotations in {name}")
    keep = {number for number, image in names.items() if image in kept}
    for part in (instances, captions):
        part["annotations"] = [row for row in part["annotations"] if row["image_id"] in keep]
    return objects_of(instances, captions, {n: image for n, image in names.items() if n in keep}, words)


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
