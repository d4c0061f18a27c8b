"""POPE questions for any data set in COCO's format, as files of the published form; and what a folder of them holds.

The rules are those of POPE's `utils.py` (AoiDragon/POPE 08d957b9; arXiv 2305.10355), see `questions.build_pope`.
The published files cannot be made again by its authors' code, which sets no seed; these can.

Which objects are in an image: for COCO's own 80 categories, its annotated instances and what its reference captions
name, as in all published labels. For other categories, and without captions, the annotated instances only: no list
of synonyms would read captions for them. Annotations that are not whole then give wrong "no" labels.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..benchmark import Request
from ..chair.coco import objects_by_image, settle_words
from ..chair.words import node_words
from ..run_folder import RunFolderError
from ..sources import DataError, Sources, find_sources, only, read_names
from .questions import Question, build_pope, load_pope, pope_version, split_digest

ABOUT = "pope.json"
_PREFIX = "coco_pope_"


@dataclass(frozen=True)
class SplitCount:
    """What one file of questions holds; `typos` counts "imange", which tells versions apart."""

    questions: int
    images: int
    yes: int
    no: int
    repeated_ids: int
    typos: int
    digest: str


@dataclass(frozen=True)
class PopeFolder:
    """A folder of POPE questions.

    Attributes:
        path: the folder, or the file of one split.
        version: see `pope_version`; "own" is in no published file.
        splits: counts by split.
        images: distinct images in all splits.
        about: how `regard` built it, where it did and the questions are still the same.
    """

    path: Path
    version: str
    splits: dict[str, SplitCount]
    images: int
    about: dict[str, Any] | None

    def __str__(self) -> str:
        """A table of the counts."""
        head = ("split", "questions", "images", "yes", "no", "yes share", "repeated ids", '"imange"')
        rows = [
            (name, s.questions, s.images, s.yes, s.no, f"{s.yes / s.questions:.1%}", s.repeated_ids, s.typos)
            for name, s in self.splits.items()
        ]
        lines = [f"{self.path}: POPE version {self.version}, {self.images} images"]
        lines.append(f"{head[0]:<13}" + "".join(f"{name:>{max(len(name), 6) + 2}}" for name in head[1:]))
        for name, *cells in rows:
            widths = [max(len(title), 6) + 2 for title in head[1:]]
            lines.append(
                f"{name:<13}" + "".join(f"{cell!s:>{w}}" for cell, w in zip(cells, widths, strict=True))
            )
        if self.about is not None:
            about = self.about
            lines.append(
                f"built with seed {about['seed']}, {about['per_image']} objects an image that are there and as many "
                f"that are not; objects: {about['objects']}"
            )
        elif self.version == "own":
            lines.append("these questions are in no published file")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self) | {"path": str(self.path)}


def check_pope(path: str | Path) -> PopeFolder:
    """Count what a folder, or the file of one split, holds, and name its version.

    Raises:
        FileNotFoundError, ValueError: as `load_pope`.
    """
    questions = load_pope(path)
    splits = {split: _counted(rows) for split, rows in questions.items()}
    images = {q.image for rows in questions.values() for q in rows}
    file = Path(path) / ABOUT
    about: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if about is not None and about.get("digests") != {name: split.digest for name, split in splits.items()}:
        about = None
    return PopeFolder(Path(path), pope_version(questions), splits, len(images), about)


def _counted(rows: Sequence[Question]) -> SplitCount:
    labels, ids = Counter(q.label for q in rows), {q.question_id for q in rows}
    return SplitCount(
        questions=len(rows),
        images=len({q.image for q in rows}),
        yes=labels["yes"],
        no=labels["no"],
        repeated_ids=len(rows) - len(ids),
        typos=sum("imange" in q.text for q in rows),
        digest=split_digest(rows),
    )


def write_pope(
    data: str | Path,
    out: str | Path,
    images: int = 500,
    seed: int = 0,
    per_image: int = 3,
    chair: str | None = None,
) -> PopeFolder:
    """Build the three files for a data set in COCO's format; the same arguments give the same bytes.

    Args:
        data: folder with `instances*.json` and, for COCO's own categories, `captions*.json`; its `images.txt`, if
            there is one, limits the images. Or one annotation file, of which the instances are taken.
        out: folder of `coco_pope_random.json`, `_popular`, `_adversarial` and `pope.json`, which tells how they came
            about.
        images: how many to draw of those that have enough objects.
        seed: of that draw, and of the random negatives.
        per_image: objects asked for that are there, and as many that are not; published files have 3.
        chair: how reference captions are read: a name of `chair.CONFIGURATIONS`; None takes what is installed.

    Raises:
        DataError: annotations are missing or cannot be used.
        ValueError: too few images with `per_image` objects, or too few objects that could be asked for.
        RunFolderError: `out` holds other questions.
    """
    objects, how, files = _objects(Path(data), chair)
    questions = build_pope(objects, images, seed, per_image)
    texts = {f"{_PREFIX}{split}.json": _lines(rows) for split, rows in questions.items()}
    about = {
        "made_by": "regard",
        "rules": "POPE, arXiv 2305.10355, its utils.py at 08d957b9",
        "images": images,
        "seed": seed,
        "per_image": per_image,
        "objects": how,
        "names": len({thing for things in objects.values() for thing in things}),
        "annotations": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
        "digests": {split: split_digest(rows) for split, rows in questions.items()},
    }
    texts[ABOUT] = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    _write(Path(out), texts)
    return check_pope(out)


def _lines(rows: Sequence[Question]) -> str:
    kept = ("question_id", "image", "text", "label")
    return "".join(
        json.dumps({key: getattr(row, key) for key in kept}, ensure_ascii=False) + "\n" for row in rows
    )


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    if folder.is_file():
        raise RunFolderError(f"{folder} is a file: choose another folder")
    there = set(folder.glob("*pope*.json*")) if folder.is_dir() else set()
    other = [file.name for file in sorted(there) if texts.get(file.name) != file.read_text(encoding="utf-8")]
    if other:
        raise RunFolderError(
            f"{folder} holds other questions ({', '.join(other[:4])}): choose another folder, or delete them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _objects(data: Path, chair: str | None) -> tuple[dict[str, list[str]], str, list[Path]]:
    """Image -> its objects; how they were found; the annotation files."""
    sources = Sources(data.parent, instances=(data,)) if data.is_file() else find_sources(data)
    if not sources.instances:
        raise DataError(
            f"{data} holds no instances*.json: give the annotation file itself, if it has another name"
        )
    wanted = read_names(sources.names) if sources.names else None
    contents = [_annotations(file) for file in sources.instances]
    names = {str(row["name"]) for content in contents for row in content["categories"]}
    own = sorted(names - set(node_words().values()))
    if not own and sources.captions:
        words = settle_words({"chair": chair})
        request = Request(str(data), sources, wanted, 0, 0, words)
        how = f"annotated instances, and what reference captions name (words: {words['truth_words']})"
        return objects_by_image(request), how, [*sources.instances, *sources.captions]
    why = f"{own[0]!r} is none of COCO's 80 categories" if own else "there are no reference captions"
    return _instances(contents, wanted), f"annotated instances only: {why}", list(sources.instances)


def _annotations(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for part, keys in {
            "images": ("id", "file_name"),
            "annotations": ("image_id", "category_id"),
            "categories": ("id", "name"),
        }.items():
            for row in content[part]:
                for key in keys:
                    row[key]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is no COCO instances file with images, annotations and categories "
            f"({type(error).__name__}: {error})"
        ) from error
    return content


def _instances(contents: Sequence[Mapping[str, Any]], wanted: Sequence[str] | None) -> dict[str, list[str]]:
    """Image -> the categories of its instances, in the order of the file, for each file on its own ids."""
    objects: dict[str, dict[str, None]] = {}
    for content in contents:
        images = {row["id"]: str(row["file_name"]) for row in content["images"]}
        categories = {row["id"]: str(row["name"]) for row in content["categories"]}
        for row in content["annotations"]:
            image, thing = images.get(row["image_id"]), categories.get(row["category_id"])
            if image is None or not thing:
                raise DataError(
                    f"an annotation is of image {row['image_id']!r} and category {row['category_id']!r}, and one of "
                    "them is not listed in its file, or has no name"
                )
            objects.setdefault(image, {})[thing] = None
    return {image: list(objects[image]) for image in only(objects, wanted)}
