"""AMBER's files: annotations, questions, listed words, and where their images lie.

Published at https://github.com/junyangwang0410/AMBER/tree/534babf6/data: 1,004 images to describe (ids 1 to 1004)
and 14,216 questions on them (ids 1005 to 15220). Its images are a separate download.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..benchmark import Request
from ..sources import DataError, ImageIndex, files_under, only, sample

DIMENSIONS = ("existence", "state", "number", "action", "relation")
ATTRIBUTES = ("state", "number", "action")

# "relation" alone is how the published file names the relation questions whose answer is no.
_TYPES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
_LAYOUT = (
    "AMBER is read from annotations.json, relation.json, safe_words.txt and query/query_all.json, at any depth of the "
    "data folder: copy the folder data of junyangwang0410/AMBER (GitHub) there. Its images, AMBER_1.jpg to "
    "AMBER_1004.jpg, are the download that the README of the same repository links: unpack them there too, or give "
    "their folder with --images"
)


@dataclass(frozen=True)
class AmberImage:
    """An image to describe: the objects that are there, and likely ones that are not (lists, with repeats)."""

    number: int
    image: str
    truth: list[str]
    hallu: list[str]


@dataclass(frozen=True)
class AmberQuestion:
    """A question on an image; `dimension` is one of `DIMENSIONS`, `label` "yes" or "no"."""

    number: int
    image: str
    text: str
    dimension: str
    label: str


@dataclass(frozen=True)
class Amber:
    """The annotations.

    Attributes:
        images: in the order of their ids.
        questions: in the order of their ids.
        relation: listed word -> words that stand for it.
        safe_words: nouns that are never judged.
    """

    images: list[AmberImage]
    questions: list[AmberQuestion]
    relation: dict[str, list[str]]
    safe_words: list[str]


def load_amber(folder: str | Path) -> Amber:
    """Read the annotations from a folder that holds them at any depth.

    Raises:
        DataError: a file is missing, is there twice with different content, or is not what it should be.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}. {_LAYOUT}")
    found = {name: _only_file(root, name) for name in ("annotations.json", "relation.json", "safe_words.txt")}
    queries = _query_files(root)
    missing = [name for name, file in found.items() if file is None] + ([] if queries else ["query_all.json"])
    if missing:
        there = [str(file.relative_to(root)) for file in [*found.values(), *queries] if file is not None]
        raise DataError(
            f"{root} has no {', '.join(missing)} (found: {', '.join(there) or 'none of AMBER files'}). {_LAYOUT}"
        )
    files = {name: file for name, file in found.items() if file is not None}
    relation = _read(files["relation.json"], _relation)
    asked: dict[int, tuple[str, str]] = {}
    for file in queries:
        asked |= _read(file, _queries)
    images, questions = _read(files["annotations.json"], lambda rows: _annotations(rows, asked))
    listed = {word for image in images for word in image.truth + image.hallu}
    lost = sorted(listed - set(relation))
    if lost:
        raise DataError(f"{files['relation.json']} lacks {len(lost)} annotated words: {', '.join(lost[:5])}")
    safe = files["safe_words.txt"].read_text(encoding="utf-8").split("\n")
    return Amber(images, questions, relation, [word.strip() for word in safe if word.strip()])


def _only_file(root: Path, name: str) -> Path | None:
    same = (file for file in files_under(root) if file.name == name)
    files = sorted(same, key=lambda file: (len(file.parts), file))
    if name == "annotations.json":  # not the only benchmark with a file of that name
        beside = [file for file in files if (file.parent / "relation.json").is_file()]
        files = beside or files
    if len({file.read_bytes() for file in files}) > 1:
        places = ", ".join(str(file.relative_to(root)) for file in files[:4])
        raise DataError(
            f"{root} holds several different {name} ({places}): keep one, or give the folder of one"
        )
    return files[0] if files else None


def _query_files(root: Path) -> list[Path]:
    whole = _only_file(root, "query_all.json")
    return (
        [whole]
        if whole
        else sorted(
            file for file in files_under(root) if file.name.startswith("query_") and file.suffix == ".json"
        )
    )


def _read(file: Path, use: Callable[[Any], Any]) -> Any:
    try:
        return use(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not AMBER's file ({type(error).__name__}: {error}). {_LAYOUT}") from error


def _relation(content: Any) -> dict[str, list[str]]:
    return {str(word): [str(other) for other in others] for word, others in content.items()}


def _queries(rows: Any) -> dict[int, tuple[str, str]]:
    return {int(row["id"]): (str(row["image"]), str(row["query"])) for row in rows}


def _annotations(
    rows: Any, asked: dict[int, tuple[str, str]]
) -> tuple[list[AmberImage], list[AmberQuestion]]:
    images, questions = [], []
    for row in sorted(rows, key=lambda row: int(row["id"])):
        number, kind, truth = int(row["id"]), row["type"], row["truth"]
        if number not in asked:
            raise ValueError(f"id {number} has no query")
        image, text = asked[number]
        if kind == "generative":
            images.append(AmberImage(number, image, list(truth), list(row["hallu"])))
        elif kind in _TYPES and truth in ("yes", "no"):
            questions.append(AmberQuestion(number, image, text, _TYPES[kind], truth))
        else:
            raise ValueError(f"id {number} has the type {kind!r} and the truth {truth!r}")
    return images, questions


def wanted_images(request: Request, amber: Amber, named: Iterable[str]) -> list[str]:
    """The images of a run, in the order of the data: those asked for, at most so many.

    The draw depends on the seed alone, so that both tasks of one run see the same images.

    Raises:
        DataError: none of the wanted images is AMBER's, or files are missing.
    """
    images = only(dict.fromkeys(named), request.wanted)
    if not images:
        raise DataError(
            f"none of the images in {request.sources.names} is one of AMBER's, such as {_first(amber)}: "
            "name them so, one per line"
        )
    drawn = sample(dict.fromkeys(images), request.items, f"{request.seed}/amber")
    if request.need_images:
        advice = f"name those you have in images.txt. {_LAYOUT}"
        ImageIndex(request.sources.images).require(list(drawn), advice)
    return list(drawn)


def _first(amber: Amber) -> str:
    known: Sequence[AmberImage | AmberQuestion] = amber.images or amber.questions
    return known[0].image if known else "AMBER_1.jpg"


def data_folder(request: Request) -> Path:
    """Where a benchmark looks for its own files."""
    return request.sources.root or request.sources.images
