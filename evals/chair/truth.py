"""Which of COCO's objects are in an image: CHAIR's ground truth, read from files or made from COCO annotations.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156.
"""

import contextlib
import gzip
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .mentions import chair_objects
from .words import ChairWords, chair_words, node_words

_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?0*(\d+)(?:\.\w+)?")


def _file_name(image: object) -> str:
    return os.path.basename(str(image).rstrip("/"))


def image_key(image: str | int) -> str:
    """One name for an image: a COCO id is the same number padded or not, with prefix and ending or not."""
    name = _file_name(image)
    if name.isascii() and name.isdigit():
        return name.lstrip("0") or "0"
    match = _COCO_NAME.fullmatch(name)
    return match.group(1) if match else name


class GroundTruth(Mapping[str, frozenset[str]]):
    """The COCO categories that are in each image, looked up by id, by file name, or by padded id.

    Attributes:
        name: which words (and file) it was made with, for the report.
    """

    def __init__(
        self,
        objects: Mapping[Any, Iterable[str]],
        aliases: Mapping[str, str | int] | None = None,
        name: str = "own",
    ) -> None:
        self.name = name
        self._objects = {image_key(image): frozenset(things) for image, things in objects.items()}
        self._aliases = {_file_name(alias): image_key(image) for alias, image in (aliases or {}).items()}

    def _find(self, image: object) -> str:
        return self._aliases.get(_file_name(image)) or image_key(str(image))

    def __getitem__(self, image: str | int) -> frozenset[str]:
        return self._objects[self._find(image)]

    def __contains__(self, image: object) -> bool:
        return self._find(image) in self._objects

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def __len__(self) -> int:
        return len(self._objects)


def load_ground_truth(path: str | Path) -> GroundTruth:
    """Read ground truth from JSON, packed with gzip or not.

    Either {image: [category, ...]}, or {"categories": [...], "objects": {image: [index, ...]}}.

    Raises:
        ValueError: the file has another form, or names no category of COCO.
    """
    path = Path(path)
    raw = path.read_bytes()
    data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path} holds a {type(data).__name__}; expected {{image: [category, ...]}}")
    if "objects" in data and "categories" in data:
        names = data["categories"]
        objects = {image: [names[i] for i in indices] for image, indices in data["objects"].items()}
    else:
        objects = data
    _known_categories({thing for things in objects.values() for thing in things}, str(path))
    return GroundTruth(objects, name=path.name.split(".")[0])


def _known_categories(names: Iterable[str], where: str) -> None:
    unknown = sorted(set(names) - set(node_words().values()))
    if unknown:
        raise ValueError(f"{where}: {len(unknown)} names are none of COCO's 80 categories: {unknown[:8]}")


def _coco(source: str | Path | Mapping[str, Any]) -> Any:
    """A pycocotools index of a file or of a dict in COCO's form."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        if isinstance(source, Mapping):
            index = COCO()
            index.dataset = dict(source)
            index.createIndex()
            return index
        return COCO(str(source))


def ground_truth(
    instances: str | Path | Mapping[str, Any],
    captions: str | Path | Mapping[str, Any] | None = None,
    words: str | ChairWords | None = None,
) -> GroundTruth:
    """The objects of each image: its annotated instances (crowds too) and what its reference captions name.

    Args:
        instances: COCO instances, a file or a dict.
        captions: COCO captions of the same images, a file or a dict; None leaves them out.
        words: how the captions' words are reduced, see ``words.chair_words``.

    Raises:
        ValueError: a category that is not one of COCO's 80, or no images.
    """
    reducer = chair_words(words)
    index = _coco(instances)
    names = {i: category["name"] for i, category in index.cats.items()}
    _known_categories(names.values(), "instances")
    objects: dict[Any, set[str]] = {i: set() for i in index.imgs}
    files = {image["file_name"]: i for i, image in index.imgs.items() if "file_name" in image}
    for annotation in index.anns.values():
        objects.setdefault(annotation["image_id"], set()).add(names[annotation["category_id"]])
    if captions is not None:
        for annotation in _coco(captions).anns.values():
            found = objects.setdefault(annotation["image_id"], set())
            found.update(mention.node for mention in chair_objects(annotation["caption"], reducer))
    if not objects:
        raise ValueError("the instances hold no images")
    return GroundTruth(
        objects, files, name=f"coco + {reducer.name}" if captions is not None else "coco instances"
    )
