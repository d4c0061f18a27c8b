"""Which answer of a file belongs to which item of a benchmark: by what the rows say, never by their order.

A published POPE script pairs by line, and answers to another version of POPE then score without a word.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..benchmark import Item
from ..chair.truth import image_key
from ..pope.questions import same_question
from ..pope.scoring import LLAVA_OFFSET, llava_place, version_advice
from ..sources import DataError
from .answer_files import AnswerFile, Given, split_in_name

_SHOWN = 3
_ENDING = re.compile(r"\.(jpe?g|png|webp|bmp)$", re.IGNORECASE)
_NO_IDS = (
    "answers are never paired by their order, since a file in another order, or made with other questions, would score "
    "all the same: add question_id (or image) to each row"
)


@dataclass(frozen=True)
class Paired:
    """The answers of one recipe.

    Attributes:
        answers: item id -> answer.
        missing: ids of the items without one.
        extra: rows that answer none of the items.
        ways: how the rows of each file were recognised.
    """

    answers: dict[str, Given]
    missing: list[str]
    extra: list[Given]
    ways: list[str]


def image_names(image: str) -> list[str]:
    """Names under which an image may be known, the surest first; COCO's are the same padded or not, whole or bare."""
    path = PurePosixPath(image.replace("\\", "/"))
    folders = [part for part in path.parts[:-1] if part not in ("images", "/")]
    stem = _ENDING.sub("", path.name)
    names = [
        "/".join([*folders, stem]),
        "/".join([*folders[-1:], stem]),
        _ENDING.sub("", image_key(path.name)),
    ]
    return list(dict.fromkeys(name for name in names if name))


class _Items:
    """The items of a benchmark, found by what a row may say."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.splits: dict[str, int] = defaultdict(int)
        self.by_id: dict[str, list[Item]] = defaultdict(list)
        self.by_image: dict[str, list[Item]] = defaultdict(list)
        self._images: dict[str, set[str]] = defaultdict(set)
        for item in items:
            if "split" in item.facts:
                self.splits[str(item.facts["split"])] += 1
            self.by_id[item.id].append(item)
            tail = item.id.rpartition("/")[2]
            if "split" in item.facts and tail != item.id:
                self.by_id[tail].append(item)
            self.by_image[item.image].append(item)
        for image in self.by_image:
            for name in image_names(image):
                self._images[name].add(image)

    def on(self, image: str) -> list[Item]:
        """The items on an image, [] when the name could be several."""
        for name in image_names(image):
            if found := self._images.get(name):
                return self.by_image[next(iter(found))] if len(found) == 1 else []
        return []


_Find = Callable[[Given], list[Item]]


class _Finder:
    """Finds the items that the rows of one file answer."""

    def __init__(self, known: _Items, file: AnswerFile) -> None:
        self.known, self.file = known, file
        name = split_in_name(file.path, list(known.splits))
        self._name_split = name if name and len(file.rows) <= known.splits[name] else None
        self._offset = any((row.id or "").isdigit() and int(row.id or 0) > LLAVA_OFFSET for row in file.rows)

    def ways(self) -> dict[str, _Find]:
        """The ways that this file allows, the surest first."""
        rows, ways = self.file.rows, dict[str, _Find]()
        has_id, has_image, has_question = (
            all(getattr(row, part) is not None for row in rows) for part in ("id", "image", "question")
        )
        if has_id:
            ways["id"] = self._by_id
        if has_image and has_question:
            ways["image and question"] = self._by_image_and_question
        if has_id and has_question:
            ways["id as image, and question"] = lambda row: self._put(row, row.id)
        if has_image:
            ways["image"] = lambda row: self._alone(row.image)
        if has_id:
            ways["id as image"] = lambda row: self._alone(row.id)
        return ways

    def named(self, row: Given) -> list[Item]:
        """The items with the row's id, whatever else it says."""
        number, split = row.id or "", self._split(row)
        if self._offset and number.isdigit():
            place = llava_place(int(number))
            if place is None:
                return []
            split, number = {place[0]}, str(place[1])
        found = self.known.by_id.get(number, [])
        if split is not None:
            found = [item for item in found if item.facts.get("split") in split]
        return found

    def _by_id(self, row: Given) -> list[Item]:
        found = self.named(row)
        if row.image is not None:
            there = {id(item) for item in self.known.on(row.image)}
            found = [item for item in found if id(item) in there]
        if row.question is not None:
            found = [item for item in found if not item.text or same_question(item.text, row.question)]
        return found

    def _by_image_and_question(self, row: Given) -> list[Item]:
        return self._put(row, row.image)

    def _put(self, row: Given, image: str | None) -> list[Item]:
        """Items on an image with the row's question."""
        split = self._split(row)
        return [
            item
            for item in self.known.on(image or "")
            if item.text
            and same_question(item.text, row.question or "")
            and (split is None or item.facts.get("split") in split)
        ]

    def _alone(self, image: str | None) -> list[Item]:
        """The only item on an image."""
        found = self.known.on(image or "")
        return found if len(found) == 1 else []

    def _split(self, row: Given) -> set[str] | None:
        """The splits that a row, or the name of its file, tells."""
        told = {part.strip() for part in (row.category or "").split(",")}
        if told <= set(self.known.splits):
            return told
        return {self._name_split} if self._name_split else None


def pair(
    items: Sequence[Item], files: Sequence[AnswerFile], by_order: bool = False, version: str | None = None
) -> Paired:
    """Pair the answers of one recipe's files with the items.

    An item's id decides, then its image with the wording of its question, then its image where it has one item only;
    what else a row says must agree. One answer stands for twins, which are the same question on the same image.

    Args:
        items: of the benchmark.
        files: of one recipe, such as one file for each split.
        by_order: take the rows in the order of the items; each must have the question of its item.
        version: of POPE, for messages.

    Raises:
        DataError: rows do not say what they answer, none of them answers an item, or an item is answered twice.
    """
    known = _Items(items)
    answers: dict[str, Given] = {}
    extra: list[Given] = []
    ways: list[str] = []
    for file in files:
        way, found = _in_order(known, file) if by_order else _best(known, file, version)
        ways.append(way)
        for row, mine in zip(file.rows, found, strict=True):
            _check_one(known, file, row, mine)
            if not mine:
                extra.append(row)
            for item in mine:
                before = answers.setdefault(item.id, row)
                if before is not row and (len(mine) == 1 or before.text != row.text):
                    raise DataError(_twice(file, row, item, before, len(mine) > 1))
    missing = [item.id for item in items if item.id not in answers]
    return Paired(answers, missing, extra, ways)


def _best(known: _Items, file: AnswerFile, version: str | None) -> tuple[str, list[list[Item]]]:
    """The way by which most rows find their item; ids that the rest of their rows contradicts are no ids of items."""
    finder = _Finder(known, file)
    ways = finder.ways()
    if not ways:
        raise DataError(
            f"{file.path} (read as {file.form}) has rows with neither ids nor images, such as row "
            f"{file.rows[0].row}: {_NO_IDS}"
        )
    found = {way: [find(row) for row in file.rows] for way, find in ways.items()}
    if not any(any(rows) for rows in found.values()):
        raise DataError(_nothing(known, file))
    if "id" in found and any(found["id"]):
        against = [
            row for row, mine in zip(file.rows, found["id"], strict=True) if not mine and finder.named(row)
        ]
        others = {way: rows for way, rows in found.items() if way != "id" and any(rows)}
        if against and not others:
            raise DataError(
                _contradiction(finder, file, against)
                + _told_version(version, len(known.items), len(file.rows))
            )
        found = others if against else found
    best = max(found, key=lambda way: sum(map(bool, found[way])))
    return best, found[best]


def _contradiction(finder: _Finder, file: AnswerFile, against: Sequence[Given]) -> str:
    row, item = against[0], finder.named(against[0])[0]
    return (
        f"{file.path}: {len(against)} of {len(file.rows)} answers have the id of another question. Row {row.row}, id "
        f"{row.id}, answers {row.question or row.image!r}, where {item.id} asks {item.text!r} on {item.image}."
    )


def _in_order(known: _Items, file: AnswerFile) -> tuple[str, list[list[Item]]]:
    split = split_in_name(file.path, list(known.splits))
    items = [item for item in known.items if split is None or item.facts.get("split") == split]
    if len(items) != len(file.rows):
        advice = version_advice(len(items), len(file.rows)) if known.splits else ""
        which = f" of {split}" if split else ""
        raise DataError(
            f"{file.path} has {len(file.rows)} answers for {len(items)} items{which}, so they cannot be taken by "
            f"order. {advice}".strip()
        )
    for row, item in zip(file.rows, items, strict=True):
        if row.question is None or not item.text or not same_question(item.text, row.question):
            raise DataError(
                f"{file.path}, row {row.row} answers {row.question!r}, where {item.id} asks {item.text!r}: by order, "
                "each row must have the question of its item"
            )
    return "order, with each question checked", [[item] for item in items]


def _check_one(known: _Items, file: AnswerFile, row: Given, found: Sequence[Item]) -> None:
    """One row answers one question on one image, however often that is asked."""
    first = found[0] if found else None
    if first is not None and not all(_twins(item, first) for item in found):
        splits = ", ".join(dict.fromkeys(str(item.facts.get("split", item.id)) for item in found))
        raise DataError(
            f"{file.path}, row {row.row} (id {row.id}) may answer several questions ({splits}): name the split in a "
            "column 'category', or give one file for each split, with the split in its name"
        )


def _twins(item: Item, other: Item) -> bool:
    return (item.image, item.text) == (other.image, other.text)


def _twice(file: AnswerFile, row: Given, item: Item, before: Given, twins: bool) -> str:
    if twins:
        return (
            f"{file.path}, rows {before.row} and {row.row} answer {item.text!r} on {item.image} differently, and "
            "nothing says which split they are of: name it in a column 'category'"
        )
    return (
        f"{file.path}: {item.id} is answered by row {before.row} and by row {row.row}. Each item needs one answer; "
        "were files of two runs joined?"
    )


def _nothing(known: _Items, file: AnswerFile) -> str:
    row, item = file.rows[0], known.items[0]
    said = {
        name: getattr(row, name) for name in ("id", "image", "question") if getattr(row, name) is not None
    }
    return (
        f"{file.path} answers none of the {len(known.items)} items. Its first row says {said}; the first item is "
        f"{item.id!r} on {item.image!r}{f', {item.text!r}' if item.text else ''}"
    )


def check_whole(
    paired: Mapping[str, Paired],
    items: Sequence[Item],
    allow_missing: bool,
    allow_extra: bool,
    version: str | None = None,
) -> None:
    """Raise for items without an answer, and for answers to no item.

    Raises:
        DataError: naming the recipe, the first few, and, for POPE, what the numbers say of its version.
    """
    for recipe, found in paired.items():
        rows = len(found.extra) + len({id(row) for row in found.answers.values()})
        advice = _told_version(version, len(items), rows)
        if found.extra and not allow_extra:
            raise DataError(
                f"{recipe}: {len(found.extra)} of {rows} answers are to none of the {len(items)} items: "
                f"{_some(map(_told, found.extra))}.{advice} To leave them aside: --allow-extra"
            )
        if found.missing and not allow_missing:
            raise DataError(
                f"{recipe}: {len(found.missing)} of {len(items)} items have no answer: "
                f"{_some(found.missing)}.{advice} To score what all files answer: --allow-missing"
            )


def _told_version(version: str | None, items: int, rows: int) -> str:
    """What is known of POPE's version, as a continuation of a message; "" for another benchmark."""
    if version is None:
        return ""
    return f" The questions are POPE version {version}. {version_advice(items, rows)}".rstrip()


def _told(row: Given) -> str:
    said = [str(part) for part in (row.id, row.image, row.question) if part is not None]
    return f"row {row.row} ({', '.join(said)[:90]})"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return "; ".join(listed[:_SHOWN]) + ("; and more" if len(listed) > _SHOWN else "")
