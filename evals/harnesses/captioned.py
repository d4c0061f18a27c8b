"""The images that files of captions describe, and what is in them: by a file of ground truth, or by annotations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..benchmark import Data
from ..chair.truth import GroundTruth
from ..sources import DataError
from .answer_files import AnswerFile, Given
from .pairing import image_names


def by_truth(names: Sequence[str], truth: GroundTruth) -> Data:
    """CHAIR's data: image -> its objects.

    Raises:
        DataError: an image has no ground truth.
    """
    lost = [name for name in names if name not in truth]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(names)} captioned images have no ground truth: {', '.join(lost[:3])}; it has "
            f"{len(truth)} images, such as {next(iter(truth), 'none')}"
        )
    return {_padded(name): sorted(truth[name]) for name in names}


def _padded(name: str) -> str:
    """A bare COCO number as a file name."""
    return f"{int(name):012d}.jpg" if name.isdigit() else name


def _file_names(instances: Sequence[Path]) -> dict[str, str]:
    """What a file of captions may call an image, its number or its name -> its name in the annotations."""
    numbers: dict[str, str] = {}
    names: dict[str, str] = {}
    for file in instances:
        for row in json.loads(file.read_text(encoding="utf-8"))["images"]:
            name = str(row["file_name"])
            numbers[str(row["id"])] = name
            names.update(dict.fromkeys(image_names(name), name))
    return numbers | names


def renamed(
    read: Mapping[str, list[AnswerFile]], baseline: str, instances: Sequence[Path]
) -> dict[str, list[AnswerFile]]:
    """The captions with the annotations' names of their images.

    Raises:
        DataError: the baseline describes images that are not annotated.
    """
    names = _file_names(instances)

    def one(row: Given) -> Given:
        image = row.image or row.id or ""
        return replace(row, image=next((names[key] for key in image_names(image) if key in names), image))

    found = {
        label: [replace(file, rows=[one(row) for row in file.rows]) for file in group]
        for label, group in read.items()
    }
    known = set(names.values())
    images = [row.image or "" for file in found[baseline] for row in file.rows]
    if lost := [image for image in images if image not in known]:
        raise DataError(
            f"{len(lost)} of {len(images)} captioned images are not in the annotations: {', '.join(lost[:3])}"
        )
    return found
