"""Files of answers that other harnesses wrote: what each row answers, and what it says. Nothing is scored here.

Forms, each found by its keys or asked for by name:

| name | rows |
| --- | --- |
| llava | JSON lines {question_id, prompt, text}: LLaVA and what descends from it (haotian-liu/LLaVA c121f043) |
| pope | {question, answer}, which have no ids: POPE's evaluate.py (AoiDragon/POPE 08d957b9) |
| captions | {image_id, caption or text}, or one mapping {image: caption}: OPERA, less-is-more, POPE's captions |
| amber | {id, response}: AMBER's inference.py (junyangwang0410/AMBER 534babf6) |
| lmms | `*_samples_<task>.jsonl` of lmms-eval; 0.7.3 leaves "doc" out, so ids come from what its task reports |
| vlmeval | VLMEvalKit's predictions (e8e78f05), as tsv, csv, json or xlsx; its index is no id of the benchmark |
| regard | `items/*.jsonl` of another run |

Pickle files are not read: reading one can run code.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...hooks.errors import UnknownName
from ..sources import DataError

Row = dict[str, Any]

_IMAGE_KEYS = ("image_id", "image", "image_path", "image_source", "image_file")
_CELL = 2**24  # csv's own limit, 128 KiB, is less than a picture in a cell


@dataclass(frozen=True)
class Given:
    """One answer of a file.

    Attributes:
        text: the answer.
        row: its place in the file, from 1.
        id, image, question, category: what the row says of its question, as text; None where it says nothing.
    """

    text: str
    row: int
    id: str | None = None
    image: str | None = None
    question: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class AnswerFile:
    """A file of answers; `form` is one of `FORMS`, `models` are those that the file names."""

    path: Path
    form: str
    rows: list[Given]
    models: tuple[str, ...]
    sha256: str


def read_answer_file(path: str | Path, form: str = "auto") -> AnswerFile:
    """Read a file of answers.

    Args:
        path: JSON lines, JSON, tsv, csv or xlsx.
        form: one of `FORMS`, or "auto" to find it by the keys of the rows.

    Raises:
        UnknownName: no form has that name.
        DataError: the file is not there, cannot be read, or a row has no answer.
    """
    path = Path(path)
    if form != "auto" and form not in FORMS:
        raise UnknownName("form of answers", form, ["auto", *FORMS])
    if not path.is_file():
        raise DataError(f"there is no file of answers {path}")
    rows = _rows(path)
    found = form if form != "auto" else _detect(path, rows)
    given = [_given(path, number, row, found) for number, row in enumerate(rows, start=1)]
    models = dict.fromkeys(str(row["model_id"]) for row in rows if row.get("model_id"))
    return AnswerFile(path, found, given, tuple(models), hashlib.sha256(path.read_bytes()).hexdigest())


# ------------------------------------------------------------------------------------------------- containers


def _rows(path: Path) -> list[Row]:
    reader = _READERS.get(path.suffix.lower(), _json_rows)
    try:
        rows = reader(path)
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as {path.suffix or 'JSON'}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} holds no rows of answers, but {str(rows)[:60]}")
    return rows


def _json_rows(path: Path) -> Any:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if not isinstance(content, dict):
        return content
    if isinstance(content.get("logs"), list):  # lmms-eval's first versions kept all rows in one object
        return content["logs"]
    rowlike = {"text", "answer", "caption", "response", "prediction"} & set(content)
    if content and not rowlike and all(isinstance(value, str) for value in content.values()):
        return [{"image_id": image, "caption": caption} for image, caption in content.items()]
    return [content]


def _table_rows(path: Path) -> list[Row]:
    before = csv.field_size_limit(_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines, delimiter="," if path.suffix.lower() == ".csv" else "\t"))
    finally:
        csv.field_size_limit(before)


def _sheet_rows(path: Path) -> list[Row]:
    try:
        from openpyxl import load_workbook
    except ImportError as missing:
        raise DataError(f"{path} is an Excel file: pip install openpyxl, or export it as .tsv") from missing
    book = load_workbook(path, read_only=True, data_only=True)
    try:
        lines = book.worksheets[0].iter_rows(values_only=True)
        head = [str(name) for name in next(lines, ())]
        return [
            dict(zip(head, line, strict=False)) for line in lines if any(cell is not None for cell in line)
        ]
    finally:
        book.close()


def _no_pickle(path: Path) -> list[Row]:
    raise DataError(
        f"{path}: pickle files are not read, since they can run code; export the answers as .tsv or .json"
    )


_READERS: dict[str, Callable[[Path], Any]] = {
    ".tsv": _table_rows,
    ".csv": _table_rows,
    ".xlsx": _sheet_rows,
    ".pkl": _no_pickle,
    ".pickle": _no_pickle,
}


# ------------------------------------------------------------------------------------------------------ forms


@dataclass(frozen=True)
class _Form:
    """Keys of a form, the first one that is there counts; `marks` are those that tell it, any of the sets."""

    marks: tuple[frozenset[str], ...]
    answer: tuple[str, ...]
    id: tuple[str, ...] = ()
    question: tuple[str, ...] = ("question", "prompt")
    category: tuple[str, ...] = ("category", "split")


def _marks(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(name.split()) for name in names)


# In the order in which they are tried.
_FORMS = {
    "lmms": _Form(_marks("filtered_resps", "resps doc_id"), ()),
    "vlmeval": _Form(_marks("prediction"), ("prediction",)),
    "regard": _Form(_marks("id image answer"), ("answer",), ("id",)),
    "amber": _Form(_marks("id response"), ("response",), ("id",)),
    "captions": _Form(_marks("caption", "image_id text"), ("caption", "text", "answer"), ("question_id",)),
    "llava": _Form(_marks("question_id text", "question_id answer"), ("text", "answer"), ("question_id",)),
    "pope": _Form(_marks("question answer"), ("answer",), ("question_id",)),
}
FORMS = tuple(_FORMS)


def _detect(path: Path, rows: Sequence[Row]) -> str:
    keys = set(rows[0])
    for name, form in _FORMS.items():
        if any(mark <= keys for mark in form.marks):
            return name
    raise DataError(
        f"{path} has none of the known forms ({', '.join(FORMS)}); the keys of its first row are "
        f"{', '.join(map(repr, rows[0]))}. Write it as JSON lines with question_id (or image_id) and text"
    )


def _given(path: Path, number: int, row: Row, name: str) -> Given:
    if name == "lmms":
        return _of_lmms(path, number, row)
    form = _FORMS[name]
    key = next((key for key in form.answer if key in row), None)
    answer = row[key] if key is not None else None
    if (
        name == "vlmeval" and key is not None
    ):  # a cell: numbers are typed, and an empty one is an empty answer
        answer = "" if answer is None else str(answer)
    if not isinstance(answer, str):
        raise DataError(
            f"{path}, row {number}: no text under {' or '.join(map(repr, form.answer))} (it is {answer!r}); its keys "
            f"are {', '.join(map(repr, row))}"
        )
    return Given(
        answer,
        number,
        _text(row, form.id),
        _text(row, _IMAGE_KEYS),
        _text(row, form.question),
        _text(row, form.category),
    )


def _of_lmms(path: Path, number: int, row: Row) -> Given:
    """A row of lmms-eval's log; `doc` where it was kept, else what the task's own metrics say of the question."""
    answer = row.get("filtered_resps", row.get("resps"))
    while isinstance(answer, list) and answer:
        answer = answer[0]
    if not isinstance(answer, str):
        raise DataError(f"{path}, row {number}: no text under 'filtered_resps' or 'resps'")
    parts = [row["doc"]] if isinstance(row.get("doc"), dict) else []
    parts += [value for value in row.values() if isinstance(value, dict)]
    known: Row = {}
    for part in parts:
        known = {**part, **known}
    asked = row.get("input")
    return Given(
        answer,
        number,
        _text(known, ("question_id", "id")),
        _text(known, _IMAGE_KEYS),
        asked if isinstance(asked, str) else _text(known, ("question",)),
        _text(known, ("category",)),
    )


def _text(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of these keys that holds something that can be a name."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value) != "":
            return str(value)
        if isinstance(value, float) and value.is_integer():  # how a spreadsheet keeps whole numbers
            return str(int(value))
    return None


def split_in_name(path: Path, splits: Sequence[str]) -> str | None:
    """The one split that a file's name tells: "random", or lmms-eval's pope_adv, pope_pop and pope_random."""
    words = re.split(r"[^a-z]+", path.stem.lower())
    found = {
        split
        for split in splits
        if any(word == split or (word in ("adv", "pop") and split.startswith(word)) for word in words)
    }
    return found.pop() if len(found) == 1 else None
