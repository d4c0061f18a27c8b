"""Where a benchmark's files lie: images, COCO annotations, POPE questions. All are found by name in a folder."""

import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .pope.questions import SPLITS
from .run_folder import EvalError

_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_Value = TypeVar("_Value")
_COCO_NUMBER = re.compile(r"(\d{12})\.\w+$")


class DataError(EvalError):
    """The data of a benchmark is not there, or not whole."""


@dataclass(frozen=True)
class Sources:
    """The files of a data set.

    Attributes:
        images: folder with the image files, at any depth.
        questions: folder (one file per split) or file of POPE questions; None builds them from the annotations.
        instances: COCO instances files; several are pooled (CHAIR pools train2014 and val2014).
        captions: COCO captions files.
        names: text file with one image name per line: only these images are used.
        root: the data folder, where other benchmarks look for their own files.
    """

    images: Path
    questions: Path | None = None
    instances: tuple[Path, ...] = ()
    captions: tuple[Path, ...] = ()
    names: Path | None = None
    root: Path | None = None


def find_sources(folder: str | Path, images: str | Path | None = None) -> Sources:
    """Look through a folder for what a benchmark needs.

    Args:
        folder: holds `instances*.json`, `captions*.json`, POPE's `*pope*.json` and `images.txt`, each optional
            and at any depth.
        images: folder of the images when they lie elsewhere.

    Raises:
        DataError: a folder is not there, or the questions of two versions of POPE lie in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(
            f"there is no data folder {root}: give a folder with images and COCO annotations, or 'miniature'"
        )
    if images is not None and not Path(images).is_dir():
        raise DataError(f"there is no image folder {images}")
    found = sorted(file for file in files_under(root) if file.suffix in (".json", ".jsonl"))
    questions = sorted({file.parent for file in found if is_question_file(file)})
    if len(questions) > 1:
        names = ", ".join(str(place.relative_to(root)) for place in questions[:5])
        raise DataError(
            f"{root} holds POPE questions in {len(questions)} folders ({names}), and they are not the same "
            "questions: give the folder of one, and the images with --images"
        )
    return Sources(
        images=Path(images) if images is not None else root,
        questions=questions[0] if questions else None,
        instances=tuple(file for file in found if file.name.startswith("instances")),
        captions=tuple(file for file in found if file.name.startswith("captions")),
        names=root / "images.txt" if (root / "images.txt").is_file() else None,
        root=root,
    )


def files_under(root: Path) -> Iterator[Path]:
    """All files at any depth. Linked folders are followed: data sets are often links; a loop of links is not."""
    seen: set[str] = set()
    for folder, inner, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            inner.clear()
            continue
        seen.add(place)
        yield from (Path(folder) / file for file in files)


def is_question_file(file: Path) -> bool:
    """Whether a file is named like `coco_pope_random.json`."""
    stem = file.stem.lower()
    return "pope" in stem and any(split in stem for split in SPLITS)


class ImageIndex:
    """Finds image files by name; `COCO_val2014_000000000042.jpg` and `000000000042.jpg` are the same image.

    A name with folders in it is a path inside the folder of the images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, Path] = {}
        self._by_number: dict[str, Path] = {}
        for file in sorted(files_under(folder)):
            if file.suffix.lower() in _IMAGES:
                self._by_name.setdefault(file.name, file)
                number = _COCO_NUMBER.search(file.name)
                if number:
                    self._by_number.setdefault(number[1], file)

    def find(self, name: str) -> Path | None:
        """The file of an image, or None."""
        if "/" in name and (self.folder / name).is_file():
            return self.folder / name
        base = Path(name).name
        number = _COCO_NUMBER.search(base)
        return self._by_name.get(base) or (self._by_number.get(number[1]) if number else None)

    def require(self, names: Sequence[str], way_out: str) -> dict[str, Path]:
        """The files of all images.

        Raises:
            DataError: some are missing; one error for all of them.
        """
        found = {name: self.find(name) for name in names}
        missing = [name for name, file in found.items() if file is None]
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise DataError(
                f"{len(missing)} of {len(found)} images are missing under {self.folder} ({some}): {way_out}"
            )
        return {name: file for name, file in found.items() if file is not None}


def image_sizes(files: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    """(width, height) of every image. Each is read to its end: better now than after hours of work.

    Raises:
        DataError: some cannot be read; one error for all of them.
    """
    with ThreadPoolExecutor() as pool:
        found = dict(zip(files, pool.map(_readable_size, files.values()), strict=True))
    sizes = {name: size for name, size in found.items() if size}
    spoilt = [str(file) for name, file in files.items() if name not in sizes]
    if spoilt:
        raise DataError(
            f"{len(spoilt)} of {len(files)} images cannot be read ({', '.join(spoilt[:3])}): replace them, or leave "
            "them out with an images.txt"
        )
    return sizes


def _readable_size(file: Path) -> tuple[int, int] | None:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return image.size
    except (OSError, SyntaxError):  # Pillow says SyntaxError for some broken PNG files
        return None


def read_names(file: Path) -> list[str]:
    """The image names of an `images.txt`, in order, without repeats.

    Raises:
        DataError: there are none.
    """
    names = list(
        dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    )
    if not names:
        raise DataError(f"{file} names no image: write one name per line, or delete it")
    return names


def same_image(name: str) -> str:
    """What two names of one image share: the COCO number where there is one, else the name."""
    number = _COCO_NUMBER.search(name)
    return number[1] if number else Path(name).name


def only(names: Iterable[str], wanted: Iterable[str] | None) -> list[str]:
    """Names that are wanted, in their own order; all when nothing is said."""
    if wanted is None:
        return list(names)
    keys = {same_image(name) for name in wanted}
    return [name for name in names if same_image(name) in keys]


def sample(entries: Mapping[str, _Value], items: int, seed: str) -> dict[str, _Value]:
    """At most so many entries, drawn with the seed, in their own order."""
    if len(entries) <= items:
        return dict(entries)
    drawn = set(random.Random(seed).sample(sorted(entries), items))
    return {name: value for name, value in entries.items() if name in drawn}
